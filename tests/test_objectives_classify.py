"""Fine-tuning and probing: golden values by hand, with numpy or scikit-learn, and what must not change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import log_loss, top_k_accuracy_score

from maejax.evals.accuracy import accuracy
from maejax.mesh import AXES, batch_sharding, make_mesh, to_global
from maejax.models import ViT
from maejax.models.layers import Blocks, draw_paths
from maejax.objectives.classify import Classifier, blend, erase, mix, paste, smooth_labels, train_flops
from maejax.optimizer import lars, layer_scales, make_optimizer
from maejax.sharding import PRESETS
from maejax.state import init_state, state_shardings
from maejax.step import make_train_step
from maejax.tree import named_leaves


def classifier(*, trained=None, pool="mean", k=5, **kwargs):
    model = {name: kwargs.pop(name) for name in ("drop_path", "positions") if name in kwargs}
    encoder = ViT(
        patch=(4, 4),
        width=32,
        depth=4,
        heads=4,
        norm=pool == "cls",
        trained=trained,
        **{"positions": "learned"} | model,
    )
    return Classifier(encoder=encoder, num_classes=k, pool=pool, **kwargs)


def a_batch(b=16, k=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (b, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, k, b).astype(np.int32),
    }


def train(objective, steps, *, batch=None, lr=3e-3, mesh=None, accum=1, seed=0, **options):
    """Losses of some steps of AdamW, the state before them and after."""
    batch = batch or a_batch()
    options = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, clip_norm=None, decay_tokens=False) | options
    tx = make_optimizer(lambda step: jnp.asarray(lr), **options)
    init = functools.partial(init_state, objective, tx, {key: x[:1] for key, x in batch.items()}, seed=0, ema=False)
    mesh = mesh or make_mesh({"dcn_data": 1, "data": 8, "fsdp": 1, "tensor": 1})
    shardings = state_shardings(jax.eval_shape(init), PRESETS["zero1"], mesh)
    state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(
        make_train_step(objective, tx, lambda step: jnp.asarray(lr), seed=seed, grad_accum_steps=accum),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    before, losses = jax.device_get(state), []
    for _ in range(steps):
        state, metrics = step(state, to_global(batch, mesh))
        losses.append(float(metrics["train/loss"]))
    return losses, before, jax.device_get(state)


# ---- The optimizers -------------------------------------------------------------------------------------------------


def shapes_of(objective):
    return jax.eval_shape(objective.init, jax.random.key(0), a_batch(1))["params"]


def test_layer_scales_by_name():
    # Official code: layer 0 is the embedding, block i is layer i + 1, n = depth + 1 all the rest; decay**(n - layer).
    scales = named_leaves(layer_scales(shapes_of(classifier(pool="cls")), depth=4, decay=0.5, trained=None))
    assert scales["encoder/cls_token"] == scales["encoder/pos_embed"] == scales["encoder/embed/kernel"] == 0.5**5
    block = scales["encoder/blocks/block/attn/qkv/kernel"]
    assert block.shape == (4, 1, 1, 1, 1) and block.reshape(-1).tolist() == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scales["encoder/blocks/block/norm1/bias"].shape == (4, 1)
    assert scales["encoder/norm/scale"] == scales["head/kernel"] == 1


@pytest.mark.parametrize("trained, blocks, norm", [(2, [0, 0, 1, 1], 1), (0, [0, 0, 0, 0], 0), (4, [1, 1, 1, 1], 1)])
def test_scales_of_what_is_frozen(trained, blocks, norm):
    scales = named_leaves(layer_scales(shapes_of(classifier(pool="cls")), depth=4, decay=1.0, trained=trained))
    assert scales["encoder/embed/bias"] == scales["encoder/pos_embed"] == 0
    assert scales["encoder/blocks/block/mlp/fc1/bias"].reshape(-1).tolist() == blocks
    assert scales["encoder/norm/bias"] == norm and scales["head/bias"] == 1


def test_layer_decay_scales_the_update_and_with_it_the_smallest_rate():
    params = {"encoder": {"embed": {"kernel": jnp.ones((2, 2))}}, "head": {"kernel": jnp.ones((2, 2))}}
    tx = make_optimizer(
        lambda step: jnp.asarray(0.1), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=None,
        scales=functools.partial(layer_scales, depth=1, decay=0.5, trained=None),
    )  # fmt: skip
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1, rtol=1e-5)  # Adam's first step is the learning rate
    np.testing.assert_allclose(updates["encoder"]["embed"]["kernel"], -0.1 * 0.25, rtol=1e-5)


def test_lars_by_hand():
    w, b = np.array([[3.0, 4.0]]), np.array([1.0])
    grads = [(np.array([[0.6, 0.8]]), np.array([0.5])), (np.array([[0.0, 2.0]]), np.array([0.25]))]
    tx = lars(lambda step: 10.0 / (step + 1), momentum=0.9, weight_decay=0.1, mask=lambda p: {"w": True, "b": False})
    params = {"w": jnp.asarray(w), "b": jnp.asarray(b)}
    state, mu_w, mu_b = tx.init(params), np.zeros_like(w), np.zeros_like(b)
    for number, (gw, gb) in enumerate(grads):
        updates, state = tx.update({"w": jnp.asarray(gw), "b": jnp.asarray(gb)}, state, params)
        params = optax.apply_updates(params, updates)
        gw = gw + 0.1 * w
        gw = gw * 0.001 * np.linalg.norm(w) / np.linalg.norm(gw)
        mu_w, mu_b = 0.9 * mu_w + gw, 0.9 * mu_b + gb
        w, b = w - 10.0 / (number + 1) * mu_w, b - 10.0 / (number + 1) * mu_b
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(params["b"], b, rtol=1e-5)


# ---- Augmentation of batches ----------------------------------------------------------------------------------------


def test_smoothed_labels_by_hand():
    got = smooth_labels(jnp.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(got, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)


def test_mixup_by_hand():
    images = jnp.arange(3.0).reshape(3, 1, 1, 1) * 10
    mixed, targets = blend(images, jnp.eye(3), 0.75)
    assert mixed.reshape(-1).tolist() == [0.25 * 20, 10, 0.75 * 20]  # the middle one is its own partner
    np.testing.assert_allclose(targets, [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]])


def test_cutmix_by_hand():
    images = jnp.stack([jnp.zeros((8, 10, 1)), jnp.ones((8, 10, 1))])
    mixed, targets = paste(images, jnp.eye(2), 0.75, jnp.array([0.5, 0.5]))  # a box of 4 x 5, rounded to 4 x 4
    expected = np.zeros((8, 10))
    expected[2:6, 3:7] = 1
    np.testing.assert_array_equal(mixed[0, :, :, 0], expected)
    np.testing.assert_array_equal(mixed[1, :, :, 0], 1 - expected)
    np.testing.assert_allclose(targets, [[0.8, 0.2], [0.2, 0.8]], rtol=1e-6)
    # At the corner only a quarter of the box is inside, and the targets say so.
    mixed, targets = paste(images, jnp.eye(2), 0.75, jnp.array([0.0, 0.0]))
    assert mixed[0].sum() == 4
    np.testing.assert_allclose(targets[0], [1 - 4 / 80, 4 / 80], rtol=1e-6)


def test_either_mixup_or_cutmix_and_always_whole_targets():
    images, labels = jnp.asarray(a_batch()["image"], jnp.float32), jax.nn.one_hot(jnp.arange(16) % 5, 5)
    mix_once = jax.jit(functools.partial(mix, mixup=0.8, cutmix=1.0))
    cuts = 0
    for i in range(40):
        mixed, targets = mix_once(jax.random.key(i), images, labels)
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
        cuts += bool(np.isin(mixed, images).all())
    assert 8 < cuts < 32
    only = mix(jax.random.key(0), images, labels, mixup=0.0, cutmix=1.0)[0]
    assert np.isin(only, images).all()


def test_erasing_fills_the_box_and_nothing_else():
    images = jnp.full((3, 64, 64, 3), 7.0)
    boxes = jnp.array([[8, 16, 32, 40], [0, 0, 0, 0], [63, 63, 1, 1]], jnp.int32)
    out = np.asarray(erase(jax.random.key(0), images, boxes))
    inside = out[0, 8:40, 16:56]
    assert (inside != 7).all() and abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.05
    outside = out.copy()
    outside[0, 8:40, 16:56] = 7
    outside[2, 63, 63] = 7
    assert (outside == 7).all() and (out[1] == 7).all() and (out[2, 63, 63] != 7).all()


# ---- Stochastic depth, batch norm, heads -------------------------------------------------------------------------


def test_paths_are_dropped_at_their_rates_and_scaled():
    attention, mlp = draw_paths(jax.random.key(0), jnp.array([0.0, 0.25, 0.5]), 20_000)
    assert set(np.unique(attention[2])) == {0.0, 2.0} and (attention[0] == 1).all()
    np.testing.assert_allclose((np.asarray(mlp) == 0).mean(1), [0, 0.25, 0.5], atol=0.015)
    np.testing.assert_allclose(np.asarray(attention).mean(1), 1, atol=0.02)
    assert (attention != mlp).any()


def test_a_dropped_block_is_the_identity_and_nothing_is_random_without_a_generator():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 8)), jnp.float32)
    blocks = Blocks(1, 2, drop_path=0.0)
    params = blocks.init(jax.random.key(0), x)
    plain = blocks.apply(params, x)[0]
    # One block has the first rate of the ramp, which is 0; of two, the second one is dropped nearly always.
    deep = Blocks(2, 2, drop_path=1 - 1e-7)
    params = deep.init(jax.random.key(0), x)
    first = {"params": {"block": jax.tree.map(lambda p: p[:1], params["params"]["block"])}}
    dropped = deep.apply(params, x, rngs={"dropout": jax.random.key(1)})[0]
    np.testing.assert_allclose(dropped, blocks.apply(first, x)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(deep.apply(params, x)[0], Blocks(2, 2).apply(params, x)[0])
    assert plain.shape == x.shape


def test_intermediate_outputs_of_blocks():
    encoder = ViT(patch=(4, 4), width=32, depth=4, heads=4)
    images = a_batch()["image"]
    params = encoder.init(jax.random.key(0), images)
    outputs = encoder.apply(params, images, layers=(0, -1))
    assert outputs.shape == (2, 16, 5, 32)
    # The first block alone, and the last one before the final norm.
    shallow = ViT(patch=(4, 4), width=32, depth=1, heads=4, norm=False)
    first = {**params["params"], "blocks": jax.tree.map(lambda p: p[:1], params["params"]["blocks"])}
    np.testing.assert_allclose(outputs[0], shallow.apply({"params": first}, images), rtol=1e-5, atol=1e-5)
    last = ViT(patch=(4, 4), width=32, depth=4, heads=4, norm=False).apply(params, images)
    np.testing.assert_allclose(outputs[1], last, rtol=1e-5, atol=1e-5)


def test_batch_norm_of_the_probe():
    objective = classifier(trained=0, pool="cls", batch_norm=True, head_std=0.01)
    batch = a_batch()
    variables = objective.init(jax.random.key(0), batch)
    features = np.asarray(objective.apply(variables, batch["image"], method="features"))[:, 0]
    (_, _), after = objective.apply(variables, batch, mutable=["batch_stats"])
    mean, var = features.mean(0), features.var(0)
    np.testing.assert_allclose(after["batch_stats"]["bn"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["batch_stats"]["bn"]["var"], 0.9 + 0.1 * var, rtol=1e-4)
    # In training by the batch, in evaluation by the running statistics (here still 0 and 1).
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    logits, _ = objective.apply(variables, batch["image"], method="logits", mutable=["batch_stats"])
    np.testing.assert_allclose(logits, (features - mean) / np.sqrt(var + 1e-6) @ kernel, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(
        objective.apply(variables, batch["image"], method="logits"), features / np.sqrt(1 + 1e-6) @ kernel,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    assert set(variables["params"]["head"]) == {"kernel", "bias"} and "bn" not in variables["params"]


def test_pooled_features_are_normalised_after_the_mean():
    objective = classifier(head_std=1.0)
    batch = a_batch()
    variables = objective.init(jax.random.key(0), batch)
    assert "norm" not in variables["params"]["encoder"]
    tokens = np.asarray(objective.apply(variables, batch["image"], method="features"), np.float64)
    x = tokens[:, 1:].mean(1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = x @ np.asarray(variables["params"]["head"]["kernel"], np.float64)
    np.testing.assert_allclose(
        objective.apply(variables, batch["image"], method="logits"), expected, rtol=1e-3, atol=1e-3
    )
    logits = expected - expected.max(-1, keepdims=True)
    by_hand = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), batch["label"]]).mean()
    assert float(objective.apply(variables, batch)[0]) == pytest.approx(by_hand, rel=1e-3)


def test_flops_of_a_classifier():
    full = dict(patches=196, pixels=768, width=768, depth=12, mlp_ratio=4.0, cls_token=True)
    # reference: a forward pass of ViT-B/16 is 34.9 GFLOP
    assert train_flops(**full, trained=None) / 1e9 == pytest.approx(3 * 34.9, rel=0.02)
    assert train_flops(**full, trained=0) / 1e9 == pytest.approx(34.9, rel=0.02)
    four = train_flops(**full, trained=4)
    assert train_flops(**full, trained=0) < four < train_flops(**full, trained=None)


# ---- Training -------------------------------------------------------------------------------------------------------


def test_it_overfits_64_images():
    batch = a_batch(64)
    losses, _, _ = train(classifier(head_std=0.02), 120, batch=batch, weight_decay=0.0)
    assert losses[0] == pytest.approx(math.log(5), rel=0.1) and losses[-1] < 0.02


@pytest.mark.parametrize("trained", [0, 2])
def test_frozen_parts_stay_bitwise_the_same(trained):
    scales = functools.partial(layer_scales, depth=4, decay=1.0, trained=trained)
    losses, before, after = train(classifier(trained=trained, pool="cls", head_std=0.02), 5, scales=scales)
    old, new = named_leaves(before.params), named_leaves(after.params)
    for name in old:
        if name.startswith("encoder/blocks/"):
            frozen = 4 - trained
            np.testing.assert_array_equal(old[name][:frozen], new[name][:frozen], err_msg=name)
            if trained and name.endswith("kernel"):
                assert all((old[name][i] != new[name][i]).any() for i in range(frozen, 4)), name
        elif name.startswith("head/") or (name.startswith("encoder/norm") and trained):
            assert (old[name] != new[name]).any(), name
        else:
            np.testing.assert_array_equal(old[name], new[name], err_msg=name)
    assert losses[-1] < losses[0]
    moments = [name for name in named_leaves(after.opt_state) if "/mu/" in name]
    assert moments and not [name for name in moments if "embed" in name]  # what is frozen altogether has none


def test_the_gradient_of_frozen_blocks_is_not_computed():
    def flops(trained):
        encoder = ViT(patch=(4, 4), width=32, depth=4, heads=4, trained=trained, scan=False)
        objective, batch = Classifier(encoder=encoder, num_classes=5), a_batch()
        params = objective.init(jax.random.key(0), batch)["params"]

        def loss(params):
            return objective.apply({"params": params}, batch)[0]

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    assert flops(1) < 0.65 * flops(None)


@pytest.mark.parametrize("data, accum", [(1, 1), (2, 2)])
def test_what_is_drawn_does_not_depend_on_devices(data, accum):
    objective = classifier(drop_path=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1)
    batch = a_batch() | {"erase": np.tile(np.array([[1, 1, 4, 4]], np.int32), (16, 1))}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:data]).reshape(1, data, 1, 1), AXES)
    expected, _, _ = train(objective, 3, batch=batch, accum=accum)
    losses, _, _ = train(objective, 3, batch=batch, accum=accum, mesh=mesh)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    if accum == 1:
        other, _, _ = train(objective, 3, batch=batch, seed=1)
        assert not np.allclose(other, expected, rtol=1e-3)


def test_running_statistics_are_kept_over_steps_and_microbatches():
    objective = classifier(trained=0, pool="cls", batch_norm=True)
    _, before, after = train(objective, 2)
    assert (before.stats["batch_stats"]["bn"]["mean"] == 0).all()
    assert (after.stats["batch_stats"]["bn"]["mean"] != 0).any()
    # Two steps leave 0.9**2 of the initial variance of 1, two steps of two microbatches 0.9**4.
    _, _, half = train(objective, 2, accum=2)
    var = (after.stats["batch_stats"]["bn"]["var"] - 0.9**2) / (1 - 0.9**2)
    expected = 0.9**4 + (1 - 0.9**4) * var
    np.testing.assert_allclose(half.stats["batch_stats"]["bn"]["var"], expected, rtol=0.1)


def test_accuracy_equals_scikit_learns():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 12)).astype(np.float32), rng.integers(0, 12, 300)
    got = accuracy(logits, labels)
    assert got["top1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert got["loss"] == pytest.approx(log_loss(labels, chances, labels=np.arange(12)), rel=1e-5)
    assert accuracy(np.zeros((3, 3)), np.array([0, 1, 2]))["top1"] == pytest.approx(1 / 3)
