"""Golden numerics of the networks, against values worked out by hand, with numpy, or stated in the literature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from maejax.models import SIZES, Decoder, ViT
from maejax.models.layers import Linear, attend, normalize, patchify, sincos_positions, take, unpatchify
from maejax.models.vit import pool
from maejax.objectives.mae import MaskedAutoencoder, normalize_patches, train_flops
from maejax.tree import count, named_leaves


def autoencoder(size: str = "B", patch: int = 16, **kwargs) -> MaskedAutoencoder:
    width, depth, heads = SIZES[size]
    encoder = ViT(patch=(patch, patch), width=width, depth=depth, heads=heads, **kwargs)
    return MaskedAutoencoder(encoder, Decoder(pixels=patch * patch * 3, **kwargs))


def tiny(**kwargs) -> MaskedAutoencoder:
    encoder = ViT(patch=(4, 2), width=32, depth=2, heads=4, mean=(0.5,), std=(0.25,), **kwargs)
    return MaskedAutoencoder(encoder, Decoder(pixels=4 * 2 * 3, width=16, depth=2, heads=2, **kwargs))


def init(objective, batch, seed=0):
    return jax.jit(objective.init)(jax.random.key(seed), batch)["params"]


def loss_of(objective, params, batch):
    return jax.jit(lambda params, batch: objective.apply({"params": params}, batch)[0])(params, batch)


def random_batch(b: int = 3, h: int = 12, w: int = 8, n: int = 12, v: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(n) for _ in range(b)]).astype(np.int32)
    image = rng.integers(0, 256, (b, h, w, 3), dtype=np.uint8)
    return {"image": image, "visible": order[:, :v], "masked": order[:, v:]}


def test_patch_order_is_row_column_channel():
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(patchify(jnp.asarray(image), (2, 3)))
    assert patches.shape == (2, 4, 18)
    by_hand = [image[1, 2 + p, 0 + q, c] for p in range(2) for q in range(3) for c in range(3)]
    assert patches[1, 2].tolist() == by_hand  # third patch: second row of patches, first column
    np.testing.assert_array_equal(unpatchify(jnp.asarray(patches), (2, 3), (2, 2)), image)


def test_sincos_table_by_hand():
    table = sincos_positions((2, 3), 8)
    assert table.shape == (6, 8) and table.dtype == np.float32
    # Patch 5 lies in row 1, column 2. d = 8: half of it for the column, with omega = 1 and 10000**-0.5 = 0.01.
    column = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    row = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    np.testing.assert_allclose(table[5], column + row, rtol=1e-6)
    np.testing.assert_array_equal(table[0], [0, 0, 1, 1, 0, 0, 1, 1])


@pytest.mark.parametrize(
    "size, patch, millions, gflop", [("B", 16, 111.91, 58.5), ("L", 16, 329.54, 124.2), ("H", 14, 657.07, 291.0)]
)
def test_parameter_counts_and_flops_are_the_papers(size, patch, millions, gflop):
    n = (224 // patch) ** 2
    batch = random_batch(1, 224, 224, n, n // 4)
    shapes = jax.eval_shape(autoencoder(size, patch).init, jax.random.key(0), batch)["params"]
    width, depth, _ = SIZES[size]
    fixed_tables = (n + 1) * (width + 512)
    assert round((count(shapes) + fixed_tables) / 1e6, 2) == millions
    flops = train_flops(
        patches=n, visible=n // 4, pixels=patch * patch * 3, width=width, depth=depth, mlp_ratio=4.0, cls_token=True,
        mask_tokens=False, decoder_width=512, decoder_depth=8,
    )  # fmt: skip
    assert flops / 1e9 == pytest.approx(gflop, rel=0.02)


def test_initial_values_by_parameter_group():
    objective = autoencoder("Ti", scan=True)
    params = init(objective, random_batch(1, 32, 32, 4, 1))
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    d, pixels = 192, 16 * 16 * 3
    block = "encoder/blocks/block"
    bounds = {
        "encoder/embed/kernel": math.sqrt(6 / (d + pixels)),
        "encoder/embed/bias": 1 / math.sqrt(pixels),  # PyTorch's default of a convolution
        f"{block}/attn/qkv/kernel": math.sqrt(6 / (d + 3 * d)),
        f"{block}/attn/proj/kernel": math.sqrt(6 / (d + d)),
        f"{block}/mlp/fc1/kernel": math.sqrt(6 / (d + 4 * d)),
        f"{block}/mlp/fc2/kernel": math.sqrt(6 / (d + 4 * d)),
        "decoder/embed/kernel": math.sqrt(6 / (d + 512)),
        "decoder/pred/kernel": math.sqrt(6 / (512 + pixels)),
    }
    for name, bound in bounds.items():
        value = leaves[name]
        assert np.abs(value).max() <= bound and np.abs(value).max() > 0.98 * bound, name
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.08), name  # of a uniform distribution
    for name, value in leaves.items():
        if name.endswith("bias") and name != "encoder/embed/bias":
            assert not value.any(), name
        if name.endswith("scale"):
            assert (value == 1).all(), name
    assert leaves["encoder/cls_token"].std() == pytest.approx(0.02, rel=0.2)
    assert leaves["decoder/mask_token"].std() == pytest.approx(0.02, rel=0.2)
    # Blocks differ from each other: the stack is not one block repeated.
    assert (leaves[f"{block}/mlp/fc1/kernel"][0] != leaves[f"{block}/mlp/fc1/kernel"][1]).any()


def test_linear_equals_a_matrix_product():
    layer = Linear((3, 4, 5))
    x = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"] + 1
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, np.einsum("bsd,dthc->bsthc", x, kernel) + bias[None, None], rtol=1e-5, atol=1e-5)


def test_attention_by_hand():
    # One head, one channel, two tokens: weights are softmax of the products.
    q = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    v = jnp.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    first = math.exp(2) / (math.exp(1) + math.exp(2))  # of token 1 on token 1's key 2
    second = math.exp(4) / (math.exp(2) + math.exp(4))
    got = np.asarray(attend(q, q, v)).reshape(-1)
    np.testing.assert_allclose(got, [10 + 10 * first, 10 + 10 * second], rtol=1e-6)


# ---- The whole network against an independent numpy one -----------------------------------------------------------


def numpy_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_blocks(x, stack, heads):
    for i in range(len(stack["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), stack)
        b, s, d = x.shape
        y = numpy_norm(x, p["norm1"])
        qkv = (y @ p["attn"]["qkv"]["kernel"].reshape(d, 3 * d) + p["attn"]["qkv"]["bias"].reshape(-1)).reshape(
            b, s, 3, heads, d // heads
        )
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        logits = q @ k.swapaxes(-1, -2) / math.sqrt(d // heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(b, s, d)
        x = x + y @ p["attn"]["proj"]["kernel"].reshape(d, d) + p["attn"]["proj"]["bias"]
        y = numpy_norm(x, p["norm2"]) @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
        y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
        x = x + y @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
    return x


def numpy_mae_loss(params, batch, *, patch, heads, decoder_heads, norm_pix, mean, std):
    """The official forward pass: embed all, drop, encode, append mask tokens, unshuffle, decode, masked mean."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    encoder, decoder = p["encoder"], p["decoder"]
    x = (batch["image"] / 255.0 - mean) / std
    b, h, w, c = x.shape
    rows, columns = h // patch[0], w // patch[1]
    patches = (
        x.reshape(b, rows, patch[0], columns, patch[1], c).transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)
    )
    d, n = encoder["embed"]["bias"].shape[0], rows * columns
    tokens = patches @ encoder["embed"]["kernel"] + encoder["embed"]["bias"] + sincos_positions((rows, columns), d)
    keep = np.stack([tokens[i, batch["visible"][i]] for i in range(b)])
    cls = np.broadcast_to(encoder["cls_token"], (b, 1, d))
    y = numpy_norm(numpy_blocks(np.concatenate([cls, keep], 1), encoder["blocks"]["block"], heads), encoder["norm"])
    y = y @ decoder["embed"]["kernel"] + decoder["embed"]["bias"]
    e = y.shape[-1]
    shuffled = np.concatenate([y[:, 1:], np.broadcast_to(decoder["mask_token"], (b, n - keep.shape[1], e))], 1)
    restore = np.argsort(np.concatenate([batch["visible"], batch["masked"]], 1), axis=1)
    full = np.take_along_axis(shuffled, restore[:, :, None], 1) + sincos_positions((rows, columns), e)
    z = numpy_blocks(np.concatenate([y[:, :1], full], 1), decoder["blocks"]["block"], decoder_heads)
    predicted = (numpy_norm(z, decoder["norm"]) @ decoder["pred"]["kernel"] + decoder["pred"]["bias"])[:, 1:]
    target = patches
    if norm_pix:
        target = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
    mask = np.ones((b, n))
    np.put_along_axis(mask, batch["visible"], 0, axis=1)
    return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_an_independent_numpy_forward(norm_pix):
    objective = tiny().clone(norm_pix=norm_pix)
    batch = random_batch()
    params = init(objective, batch, seed=1)
    # Biases and scales away from 0 and 1, so that each of them matters.
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    loss = loss_of(objective, params, batch)
    expected = numpy_mae_loss(
        params, batch, patch=(4, 2), heads=4, decoder_heads=2, norm_pix=norm_pix, mean=0.5, std=0.25
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_loss_on_a_hand_made_example():
    # Predictions are zero when the last layer is: the loss is the mean square of the target.
    batch = random_batch(1, 4, 4, 2, 1)
    objective = tiny()
    params = init(objective, batch)
    params["decoder"]["pred"] = jax.tree.map(jnp.zeros_like, params["decoder"]["pred"])
    normalized = loss_of(objective, params, batch)
    # With ddof 1, a patch of k values has k - 1 as the sum of its squares; eps takes a millionth.
    assert float(normalized) == pytest.approx(23 / 24, rel=1e-4)
    raw = loss_of(objective.clone(norm_pix=False), params, batch)
    hidden = int(batch["masked"][0, 0])
    pixels = (batch["image"][0, :, 2 * hidden : 2 * hidden + 2] / 255 - 0.5) / 0.25
    assert float(raw) == pytest.approx((pixels**2).mean(), rel=1e-5)


def test_normalized_patches_use_the_unbiased_variance():
    values, mean, std = normalize_patches(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    assert float(mean[0, 0]) == 3 and float(std[0, 0]) == pytest.approx(math.sqrt(14 / 3), rel=1e-6)
    np.testing.assert_allclose(values[0], np.array([-2, -1, 0, 3]) / math.sqrt(14 / 3), rtol=1e-5)


def test_normalize_pixels():
    image = np.array([[[[0, 255, 51]]]], np.uint8)
    got = normalize(jnp.asarray(image), (0.5, 0.0, 0.1), (0.5, 2.0, 0.1))
    np.testing.assert_allclose(np.asarray(got).reshape(-1), [-1, 0.5, 1], rtol=1e-6)


def test_order_of_indices_does_not_matter():
    objective, batch = tiny(), random_batch()
    params = init(objective, batch)
    loss = loss_of(objective, params, batch)
    ordered = batch | {"visible": np.sort(batch["visible"], 1), "masked": np.sort(batch["masked"], 1)}
    again = loss_of(objective, params, ordered)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)


def test_hidden_pixels_do_not_reach_the_prediction():
    objective, batch = tiny(), random_batch()
    params = init(objective, batch)
    changed = np.array(batch["image"])
    place = int(batch["masked"][0, 0])
    r, s = divmod(place, 4)
    changed[0, 4 * r : 4 * r + 4, 2 * s : 2 * s + 2] ^= 255
    predict = [
        objective.apply({"params": params}, image, batch["visible"], batch["masked"], method="predict")
        for image in (batch["image"], changed)
    ]
    np.testing.assert_array_equal(predict[0], predict[1])


@pytest.mark.parametrize("changes", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_and_remat_do_not_change_the_function(changes):
    batch = random_batch()
    params = init(tiny(), batch)

    def loss(objective):
        return jax.jit(jax.value_and_grad(lambda p: objective.apply({"params": p}, batch)[0]))(params)

    value, grads = loss(tiny())
    other_value, other_grads = loss(tiny(**changes))
    assert float(value) == pytest.approx(float(other_value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, other_grads)
    initial = jax.tree.map(np.asarray, init(tiny(**changes), batch))
    jax.tree.map(np.testing.assert_array_equal, initial, params)


def test_without_class_token_and_with_mask_tokens_in_the_encoder():
    batch = random_batch()
    for kwargs, encoded in (({"cls_token": False}, 3), ({"mask_tokens": True}, 13)):
        objective = tiny(**kwargs)
        params = init(objective, batch)
        loss = loss_of(objective, params, batch)
        assert np.isfinite(loss)
        tokens = objective.encoder.apply({"params": params["encoder"]}, batch["image"], batch["visible"])
        assert tokens.shape == (3, encoded, 32)


def test_features_of_any_size_and_pooling():
    objective = tiny()
    params = init(objective, random_batch())
    tokens = objective.apply({"params": params}, random_batch(2, 24, 6, 18, 5)["image"], method="features")
    assert tokens.shape == (2, 1 + 6 * 3, 32)
    np.testing.assert_array_equal(pool(tokens, "cls", True), tokens[:, 0])
    np.testing.assert_allclose(pool(tokens, "mean", True), np.asarray(tokens)[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="class token"):
        pool(tokens, "cls", False)


def test_bfloat16_keeps_float32_parameters_and_loss():
    objective, batch = tiny(dtype=jnp.bfloat16), random_batch()
    params = init(objective, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    loss = loss_of(objective, params, batch)
    exact = loss_of(tiny(), params, batch)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.02)


def test_take_gathers_rows():
    tokens = jnp.arange(12.0).reshape(2, 3, 2)
    got = take(tokens, jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(got, [[[4, 5], [0, 1]], [[8, 9], [8, 9]]])
