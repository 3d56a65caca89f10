"""Attention and blocks as TPUs like them are the same function: kernels interpreted on the CPU, against plain ones."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maejax.chips import CHIPS
from maejax.forecast import kernel_cycles
from maejax.models import attention_tpu, blocks_tpu
from maejax.models.layers import Blocks

# Images, tokens, heads, channels: heads of a quarter, half, five eighths and all of a tile; tokens of one and two.
SHAPES = [(8, 9, 4, 32), (4, 50, 2, 64), (8, 7, 8, 80), (8, 5, 1, 128), (8, 133, 4, 32)]


def attention(qkv, s, heads):
    """By the formula, image by image and head by head, float64."""
    rows, d = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = np.moveaxis(qkv.astype(np.float64).reshape(rows // s, s, 3, heads, d // heads), (2, 3), (0, 2))
    weights = np.exp(q @ np.swapaxes(k, 2, 3) / np.sqrt(d // heads))
    weights /= weights.sum(-1, keepdims=True)
    return np.moveaxis(weights @ v, 1, 2).reshape(rows, d)


@pytest.mark.parametrize("b, s, heads, c", SHAPES)
def test_the_kernel_is_softmax_attention(b, s, heads, c):
    rng, d = np.random.default_rng(0), heads * c
    qkv, grad = (rng.normal(size=(b * s, n * d)).astype(np.float32) for n in (3, 1))
    assert attention_tpu.fits(b * s, s, d, heads)
    out, vjp = jax.vjp(lambda qkv: attention_tpu.attend_rows(qkv, s, heads, True), jnp.asarray(qkv))
    np.testing.assert_allclose(out, attention(qkv, s, heads), atol=1e-5)
    # The derivative along a random direction, by a difference of the formula's float64.
    along, step = rng.normal(size=qkv.shape), 1e-6
    difference = attention(qkv + step * along, s, heads) - attention(qkv - step * along, s, heads)
    expected = (difference * grad).sum() / (2 * step)
    assert (np.asarray(vjp(jnp.asarray(grad))[0]) * along).sum() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_large_scores_do_not_overflow():
    qkv = np.zeros((8 * 8, 3 * 128), np.float32)
    qkv[:, :256] = 1e3 * np.random.default_rng(1).choice([-1, 1], (64, 1))
    qkv[:, 256:] = np.random.default_rng(2).normal(size=(64, 128))
    out = attention_tpu.attend_rows(jnp.asarray(qkv), 8, 4, True)
    same = (qkv[:, None, 0] == qkv[None, :, 0]) & (np.arange(64)[:, None] // 8 == np.arange(64)[None] // 8)
    expected = (same @ qkv[:, 256:]) / same.sum(1, keepdims=True)  # the mean of those whose key has the query's sign
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_what_does_not_fill_tiles_is_left_to_xla():
    assert not attention_tpu.fits(8 * 50, 50, 192, 3)  # three heads of 64
    assert not attention_tpu.fits(6 * 50, 50, 128, 2)  # six images of 50 rows are no blocks of four
    assert attention_tpu.fits(4 * 50, 50, 128, 2)


@pytest.fixture
def interpreted(monkeypatch):
    plain = attention_tpu.attend_rows
    monkeypatch.setattr(blocks_tpu, "attend_rows", lambda qkv, s, heads: plain(qkv, s, heads, True))
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("options", [{}, {"scan": False, "remat": "dots"}, {"drop_path": 0.5}, {"trained": 1}])
def test_blocks_of_rows_are_blocks(options, interpreted):
    """Outputs, those inside, gradients of parameters and of the input; and on a mesh, each device its own images."""
    x = jax.random.normal(jax.random.key(0), (16, 9, 128))
    plain = Blocks(2, 4, **options)
    params = plain.init(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(4), leaf.shape), params)
    along = jax.random.normal(jax.random.key(2), x.shape)

    devices = np.array(jax.devices()[:2]).reshape(2, 1)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def results(blocks, x, has=()):
        def loss(params, x):
            y, inside = blocks.apply(params, x, collect=True, rngs={"dropout": jax.random.key(3)})
            return (y * along).sum(), (y, inside)

        def run(params, x):
            context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if "shard_map" in has else nullcontext()
            with context:
                return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

        text = str(jax.make_jaxpr(run)(params, x))
        assert all((name in text) == (name in has) for name in ("pallas_call", "shard_map"))
        return jax.jit(run)(params, x)

    expected = results(plain, x)
    alone = results(plain.clone(platform="tpu"), x, has=("pallas_call",))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    split = results(plain.clone(platform="tpu"), rows, has=("pallas_call", "shard_map"))
    for got in (alone, split):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_several_devices_without_a_mesh_in_the_context_get_plain_blocks():
    """XLA refuses to split a kernel: evaluations and pictures have no such context."""
    assert jax.device_count() == 8 and not blocks_tpu.usable(16, 9, 128, 2)


def test_kernels_count_their_products():
    """197 tokens, 16 heads of 32: two tiles of keys, a window of one tile; forward two products, backward five."""
    forward = attention_tpu.count(8 * 197, 197, 512, 16, backward=False)
    backward = attention_tpu.count(8 * 197, 197, 512, 16, backward=True)
    assert forward == {"matrix_cycles": str(8 * 16 * 2 * 2 * 328), "programs": "4", "bytes": str(8 * 197 * 4096)}
    assert backward["matrix_cycles"] == str(8 * (16 * (3 * 2 * 328 + 2 * 4 * 160) + 4 * 4 * 200))


def test_a_kernel_takes_its_programs_or_its_bytes():
    """v5e, by hand: four units of 128 x 128 at 1.5 GHz (197 TFLOP/s), 819 GB/s."""
    few = kernel_cycles({"matrix_cycles": 4000, "programs": 2, "bytes": 0}, CHIPS["v5e"])
    assert few == pytest.approx(1000 + 2 * 500, rel=0.01)
    many = kernel_cycles({"matrix_cycles": 4000, "programs": 2, "bytes": 819_000_000}, CHIPS["v5e"])
    assert many == pytest.approx(1.5e6, rel=0.01)
