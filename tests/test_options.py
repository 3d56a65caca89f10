"""Options that change the function: a part of the masked patches, cross-attention in the decoder, images that grow."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from scipy.stats import chi2

from maejax import build
from maejax import config as configs
from maejax.cli import main
from maejax.commands.plan import lines
from maejax.data.masking import SAMPLERS, Mask, num_decoded
from maejax.forecast import forecast, traced_flops
from maejax.ledger import expected_chain
from maejax.manifest import read_meta
from maejax.mesh import make_mesh
from maejax.models import CrossDecoder, ViT
from maejax.models.layers import sincos_positions
from maejax.objectives.mae import MaskedAutoencoder, normalize_patches
from maejax.overrides import override
from maejax.program import make_program
from maejax.stored import load_weights, newest_verified
from maejax.targets import parse_targets
from maejax.train import stretches
from maejax.tree import named_leaves

TINY = {
    "data.source": "digits", "data.channels": "1", "data.mean": "0.3", "data.std": "0.4", "image_size": "16",
    "model.patch": "4", "model.width": "32", "model.depth": "3", "model.heads": "4", "decoder.width": "16",
    "decoder.depth": "2", "decoder.heads": "2", "batch_size": "8", "total_steps": "6", "warmup_steps": "2",
    "base_lr": "1e-2", "data.workers": "0",
}  # fmt: skip


def tiny(**keys):
    return override(configs.default(), TINY | {key.replace("__", "."): value for key, value in keys.items()})


def random_batch(b=3, n=12, v=3, seed=0):
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(n) for _ in range(b)]).astype(np.int32)
    image = rng.integers(0, 256, (b, 12, 8, 3), dtype=np.uint8)
    return {"image": image, "visible": order[:, :v], "masked": order[:, v:]}


def crossed(**kwargs):
    encoder = ViT(patch=(4, 2), width=32, depth=3, heads=4, mean=(0.5,), std=(0.25,), **kwargs)
    return MaskedAutoencoder(encoder, CrossDecoder(pixels=24, width=16, depth=2, heads=2, **kwargs))


def new_params(objective, batch, seed=1):
    params = jax.jit(objective.init)(jax.random.key(seed), batch)["params"]
    # Biases and scales away from 0 and 1, so that each of them matters.
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


def value_and_grad(objective, params, batch):
    return jax.jit(jax.value_and_grad(lambda p: objective.apply({"params": p}, batch)[0]))(params)


def assert_close(grads, others):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, others)


# ---- A part of the masked patches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masked, subset, expected", [(147, 1.0, 147), (147, 0.5, 74), (147, 1 / 3, 49), (48, 0.75, 36), (3, 0.01, 1)]
)
def test_number_of_decoded_patches(masked, subset, expected):
    assert num_decoded(masked, subset) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_subset_is_of_the_hidden_patches_and_leaves_the_visible_ones(sampler):
    whole, part = (Mask(sampler=sampler, grid=(6, 6), visible=9, decoded=count) for count in (None, 7))
    for seed in range(20):
        a, b = (mask({}, np.random.default_rng(seed)) for mask in (whole, part))
        np.testing.assert_array_equal(a["visible"], b["visible"])
        assert b["masked"].dtype == np.int32 and b["masked"].shape == (7,) and (np.diff(b["masked"]) > 0).all()
        assert set(b["masked"]) <= set(a["masked"]) and len(a["masked"]) == 27


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_subset_is_drawn_uniformly(sampler):
    """By rank among the hidden patches, whatever shape they have: chi-square with 1 in 10,000 false alarms."""
    mask, draws, hidden, decoded = Mask(sampler=sampler, grid=(4, 4), visible=4, decoded=3), 3000, 12, 3
    counts = np.zeros(hidden)
    for seed in range(draws):
        found = mask({}, np.random.default_rng(seed))
        rest = np.setdiff1d(np.arange(16), found["visible"])
        counts[np.searchsorted(rest, found["masked"])] += 1
    expected = draws * decoded / hidden
    # Without replacement counts vary less than multinomial ones: by (1 - 3/12) * 12/11.
    statistic = ((counts - expected) ** 2).sum() / expected / ((1 - decoded / hidden) * hidden / (hidden - 1))
    assert statistic < chi2.ppf(0.9999, hidden - 1)
    assert statistic > chi2.ppf(0.0001, hidden - 1)


def test_a_subset_of_all_is_todays_run_to_the_bit():
    a, b = build.training_transforms(tiny())[-1], Mask(sampler="random", grid=(4, 4), visible=4)
    assert dataclasses.replace(a, decoded=None) == b
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    for name, value in a({}, one).items():
        np.testing.assert_array_equal(value, b({}, np.random.default_rng(5))[name])
    b({}, other)
    assert one.bit_generator.state == other.bit_generator.state  # nothing more was drawn, which matters to repeats


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_loss_of_a_subset_is_the_mean_over_its_patches(kind):
    """And the gradient is of that: squared errors by numpy, of what `predict` says."""
    c = tiny(decoder__kind=kind, decoder__subset="0.5")
    objective, rng = build.make_objective(c), np.random.default_rng(0)
    order = np.stack([rng.permutation(16) for _ in range(2)]).astype(np.int32)
    image = rng.integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    batch = {"image": image, "visible": order[:, :4], "masked": order[:, 4:10]}
    params = new_params(objective, batch)
    pixels = jnp.asarray((image / np.float32(255) - np.float32(0.3)) / np.float32(0.4), jnp.float32)
    patches = pixels.reshape(2, 4, 4, 4, 4, 1).swapaxes(2, 3).reshape(2, 16, 16)
    target = normalize_patches(patches)[0]

    def by_hand(params):
        said = objective.apply({"params": params}, pixels, batch["visible"], batch["masked"], method="predict")
        errors = [jnp.square(said[i, j] - target[i, k]).mean() for i in (0, 1) for j, k in enumerate(order[i, 4:10])]
        return sum(errors) / 12

    loss, grads = value_and_grad(objective, params, batch)
    expected, others = jax.jit(jax.value_and_grad(by_hand))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert_close(grads, others)


def test_pictures_show_all_masked_patches(tmp_path):
    from maejax.runs import Painter

    c = tiny(decoder__subset="0.25", decoder__kind="cross")
    objective = build.make_objective(c)
    params = objective.init(jax.random.key(0), build.example_batch(c, None))["params"]
    painter = Painter(c, objective, np.zeros((2, 16, 16, 1), np.uint8))
    assert painter._masked.shape == (2, 12)
    painter.draw(params, tmp_path / "p.png", "")


# ---- Cross-attention ------------------------------------------------------------------------------------------------


def norm(x, p):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(x, p):
    inputs = math.prod(p["kernel"].shape) // p["bias"].size
    return x @ p["kernel"].reshape(inputs, -1) + p["bias"].reshape(-1)


def cross_decoder_by_numpy(p, outputs, masked, grid, heads):
    """Image by image, head by head, query by query."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    width, predictions = p["mask_token"].shape[-1], []
    table, channels = sincos_positions(grid, width).astype(np.float64), width // heads
    for image, places in enumerate(masked):
        x = p["mask_token"][0] + table[places]
        for i, mix in enumerate(p["mix"]):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"]["block"])
            memory = norm(sum(w * outputs[j, image] for j, w in enumerate(mix)), block["norm_memory"])
            attn, queries = block["attn"], norm(x, block["norm1"])
            q, kv, read = linear(queries, attn["q"]), linear(memory, attn["kv"]), np.zeros_like(x)
            for head in range(heads):
                own = slice(head * channels, (head + 1) * channels)
                keys, values = kv[:, own], kv[:, width:][:, own]
                for row in range(len(x)):
                    weights = np.exp(keys @ q[row, own] / math.sqrt(channels))
                    read[row, own] = weights @ values / weights.sum()
            x = x + linear(read, attn["proj"])
            hidden = linear(norm(x, block["norm2"]), block["mlp"]["fc1"])
            x = x + linear(hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))), block["mlp"]["fc2"])
        predictions.append(linear(norm(x, p["norm"]), p["pred"]))
    return np.stack(predictions)


def test_the_cross_decoder_equals_an_independent_numpy_one():
    objective, batch = crossed(), random_batch()
    params = new_params(objective, batch)
    pixels = (batch["image"] / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    outputs = [
        objective.encoder.apply({"params": params["encoder"]}, pixels, batch["visible"], layers=[i]) for i in range(3)
    ]
    outputs = np.concatenate(outputs).astype(np.float64)
    assert outputs.shape == (3, 3, 4, 32)  # blocks, images, class token and visible patches, width
    said = objective.apply({"params": params}, pixels, batch["visible"], batch["masked"], method="predict")
    expected = cross_decoder_by_numpy(params["decoder"], outputs, batch["masked"], (3, 4), 2)
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-5)


def test_queries_do_not_see_each_other():
    """So what is said of a patch is the same whichever others are decoded, unlike with self-attention."""
    batch = random_batch()
    for objective, same in (
        (crossed(), True),
        (build.make_objective(tiny(data__channels="3", model__patch="4,2")), False),
    ):
        params = new_params(objective, batch)
        pixels = np.asarray(batch["image"], np.float32) / 255

        def predict(masked, objective=objective, params=params, pixels=pixels):
            return objective.apply({"params": params}, pixels, batch["visible"], masked, method="predict")

        alone, all_of_them = predict(batch["masked"][:, :2]), predict(batch["masked"])[:, :2]
        assert np.allclose(alone, all_of_them, rtol=1e-4, atol=1e-5) == same


def test_a_cross_decoder_takes_one_blocks_tokens_too():
    """Objectives from outside hand over the encoder's last output, as they do to the other decoder."""
    decoder = CrossDecoder(pixels=24, width=16, depth=2, heads=2)
    batch, tokens = random_batch(), np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)
    arguments = batch["visible"], batch["masked"], (3, 4)
    params = decoder.init(jax.random.key(0), tokens, *arguments)
    np.testing.assert_array_equal(
        decoder.apply(params, tokens, *arguments), decoder.apply(params, tokens[None], *arguments)
    )
    assert params["params"]["mix"].shape == (2, 1)


@pytest.mark.parametrize("changes", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_and_remat_do_not_change_the_cross_decoder(changes):
    batch = random_batch()
    params = new_params(crossed(), batch)
    value, grads = value_and_grad(crossed(), params, batch)
    other, others = value_and_grad(crossed(**changes), params, batch)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    assert_close(grads, others)


@pytest.mark.parametrize(
    "axes, sharding",
    [("8,1,1", "zero1"), ("1,8,1", "fsdp"), ("1,1,2", "tensor"), ("2,2,2", "fsdp"), ("2,2,2", "zero1")],
)
def test_every_mesh_computes_the_same_with_cross_attention(axes, sharding):
    def curve(axes, sharding):
        data, fsdp, tensor = axes.split(",")
        c = tiny(
            decoder__kind="cross", decoder__subset="0.5", mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor,
            sharding=sharding,
        )  # fmt: skip
        count = int(data) * int(fsdp) * int(tensor)
        mesh = make_mesh(c.mesh, jax.devices()[:count])
        program = make_program(c, mesh, num_examples=100, num_classes=10)
        if sharding == "tensor":
            kv = named_leaves(program.shapes.params)["decoder/blocks/block/attn/kv/kernel"]
            assert kv.sharding.shard_shape(kv.shape) == (2, 32, 2, 1, 8)  # a head each
        state, losses, rng = program.new_state(), [], np.random.default_rng(0)
        for _ in range(3):
            order = np.stack([rng.permutation(16) for _ in range(8)]).astype(np.int32)
            batch = {
                "image": rng.integers(0, 256, (8, 16, 16, 1), dtype=np.uint8), "visible": order[:, :4],
                "masked": order[:, 4:10], "label": np.zeros(8, np.int32),
            }  # fmt: skip
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["train/loss"]))
        return losses

    np.testing.assert_allclose(curve(axes, sharding), curve("1,1,1", "replicate"), rtol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"decoder__subset": "0.5"},
        {"decoder__kind": "cross"},
        {"decoder__kind": "cross", "decoder__subset": "0.25", "model__cls_token": "false"},
    ],
)
def test_analytic_flops_are_those_that_are_traced(keys):
    """But for the scores q.k, which every attention computes again in the backward pass."""
    c = tiny(**keys)
    s, extra = build.shapes_of(c), int(c.model.cls_token)
    program = make_program(c, make_mesh(c.mesh), num_examples=100, num_classes=None)
    encoded = s.visible + extra
    decoder = s.decoded * encoded if c.decoder.kind == "cross" else (encoded + s.decoded) ** 2
    scores = 2 * (3 * encoded**2 * 32 + 2 * decoder * 16)
    assert traced_flops(program) == pytest.approx(8 * (build.flops_per_image(c) + scores), rel=0.02)


def test_flops_of_vit_b16_with_cross_attention_by_hand():
    """196 patches, 49 visible, 49 of the 147 hidden ones decoded (CrossMAE's quarter of all patches), 12 blocks."""
    c = override(
        configs.load("pretrain_vit_b16_imagenet"),
        {"decoder.kind": "cross", "decoder.depth": "12", "decoder.subset": str(1 / 3)},
    )
    encoder = 12 * (24 * 50 * 768**2 + 4 * 50**2 * 768)
    queries = 12 * (2 + 2 + 16) * 49 * 512**2
    memory = 12 * (4 * 50 * 768 * 512 + 2 * 12 * 50 * 768)
    attention, head = 12 * 4 * 49 * 50 * 512, 2 * 49 * 512 * 768
    expected = 3 * (encoder + queries + memory + attention + head) + 2 * 2 * 49 * 768 * 768
    assert build.flops_per_image(c) == pytest.approx(expected, rel=1e-9)


# ---- Images that grow -----------------------------------------------------------------------------------------------


def test_sides_are_equal_parts_of_the_run():
    c = tiny(data__sides="8,12,16")
    assert [(a, b, p.image_size) for a, b, p in build.parts(c, 6)] == [(0, 2, (8,)), (2, 4, (12,)), (4, 6, (16,))]
    assert [(a, b) for a, b, _ in build.parts(c, 100)] == [(0, 33), (33, 67), (67, 100)]
    assert build.parts(tiny(), 6) == [(0, 6, tiny())]
    each = [build.flops_per_image(tiny(image_size=side)) for side in ("8", "12", "16")]
    assert build.mean_flops_per_image(c) == pytest.approx(sum(each) / 3)
    by_step = build.flops_by_step(c, 6)
    assert [by_step(step) for step in (1, 2, 3, 6)] == [each[0], each[0], each[1], each[2]]


def test_a_run_is_cut_by_sides_and_by_rollbacks():
    c = tiny(data__sides="8,16")

    def cut(rollbacks):
        return [(a, b, ahead, sized.image_size[0]) for a, b, ahead, sized in stretches(c, 1, 6, rollbacks)]

    assert cut([]) == [(1, 3, 0, 8), (3, 6, 0, 16)]
    # A size belongs to the step, not to the place in the stream that a rollback has moved.
    assert cut([{"at": 4, "to": 2, "offset": 2}]) == [(1, 2, 0, 8), (2, 3, 2, 8), (3, 6, 2, 16)]


def finished(folder, *flags, save_at=6, resume=False):
    """A run to its end (once more from `save_at`, if `resume`); its last weights and ledger."""
    run = ["pretrain", "--config=pretrain_digits", f"--workdir={folder}", "--config.evals=", "--config.norm_pix=true"]
    run += [f"--config.{key}={value}" for key, value in TINY.items()]
    run += [f"--config.save_steps={save_at}", "--config.tensorboard=false", *flags]
    assert main(run) == 0
    if resume:
        for checkpoint in (folder / "checkpoints").iterdir():
            if int(checkpoint.name) > save_at:
                shutil.rmtree(checkpoint)
        assert main(run) == 0
    c = configs.from_dict(json.loads((folder / "config.json").read_text()))
    objective = build.make_objective(c)
    shapes = jax.eval_shape(objective.init, jax.random.key(0), build.example_batch(c, None))["params"]
    newest = newest_verified(folder)
    return named_leaves(load_weights(newest, shapes)), read_meta(newest)["ledger"]


@pytest.mark.parametrize(
    "flags, resume_at",
    [
        (("--config.data.sides=8,16",), 2),  # before the size changes
        (("--config.decoder.kind=cross", "--config.decoder.subset=0.5", "--config.data.repeats=2"), 3),
    ],
)
def test_resumes_exactly(flags, resume_at, tmp_path, capsys):
    whole, ledger = finished(tmp_path / "whole", *flags, save_at=resume_at)
    again, same = finished(tmp_path / "again", *flags, save_at=resume_at, resume=True)
    assert f"resuming at step {resume_at}" in capsys.readouterr().out
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name], err_msg=name)
    repeats = 2 if "repeats" in flags[-1] else 1
    assert ledger == same == expected_chain(num_examples=1438, seed=0, batch_size=8, steps=6, repeats=repeats)


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, says",
    [
        (["decoder.subset=0"], "decoder.subset=0.0 must be more than 0 and at most 1"),
        (["decoder.subset=1.5"], "decoder.subset=1.5 must be more than 0 and at most 1"),
        (["decoder.subset=nan"], "decoder.subset=nan must be finite"),
        (["decoder.kind=crossed"], "decoder.kind='crossed' is not one of self, cross"),
        (["decoder.kind=cross", "model.mask_tokens=true"], "decoder.kind=cross reads visible patches alone"),
        (["data.sides=16,8"], "data.sides=(16, 8) must grow and end with image_size=(16,)"),
        (["data.sides=8,12"], "must grow and end with image_size"),
        (["data.sides=8,8,16"], "must grow and end with image_size"),
        (["data.sides=10,16"], "data.sides=(10, 16): 10 is no multiple of model.patch=(4,)"),
        (["data.sides=4,16"], "4 is no multiple of model.patch=(4,) with two patches or more"),
        (["data.sides=0,16"], "0 is no multiple of"),
        (["data.sides=8.5,16"], "whole numbers"),
        (["data.sides=8,16", "model.positions=learned"], "data.sides needs model.positions=fixed"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, says, tmp_path, capfd):
    command = ["pretrain", "--config=pretrain_digits", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, *(f"--config.{flag}" for flag in flags)]) == 2
    err = capfd.readouterr().err
    assert says in err and err.count("\n") == 1, err


def test_the_decoder_of_cross_attention_stays_here(tmp_path, capfd):
    finished(tmp_path / "run", "--config.decoder.kind=cross")
    capfd.readouterr()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=safetensors"]) == 2
    assert "--to=safetensors; use --encoder-only" in capfd.readouterr().err
    for to in ("safetensors", "big_vision"):
        target = str(tmp_path / to)
        assert main(["convert", str(tmp_path / "run"), target, f"--to={to}", "--encoder-only", "--verify"]) == 0


def test_a_plan_counts_the_mixture_of_sides():
    """Hours of a GPU are by FLOPs: those of the mean image, not of the last."""
    target = parse_targets("gpu:h100x8")[0]
    c = override(configs.load("pretrain_vit_b16_imagenet"), {"data.sides": "128,160,192,224"})
    grown, whole = (forecast(config, target, 10_000) for config in (c, override(c, {"data.sides": "()"})))
    assert grown.step_time == whole.step_time and grown.memory == whole.memory
    share = np.mean([build.flops_per_image(override(c, {"image_size": str(side)})) for side in c.data.sides])
    assert grown.hours / whole.hours == pytest.approx(share / build.flops_per_image(c))
    assert any("0.64 x that of all steps at 224 px, sides 128, 160, 192, 224" in line for line in lines(grown, c, None))
