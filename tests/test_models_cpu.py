"""The forms of layers for CPUs and GPUs: the functions and gradients of the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from scipy.special import erf

from maejax.models import cpu, layers
from maejax.models.layers import Attention, Linear, attend, gelu, layer_norm


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_gradients(function, *arguments):
    """What it gives, and the gradients of a sum with weights that are not all alike."""
    y, pullback = jax.vjp(jax.jit(function), *arguments)
    return [y, *pullback(jnp.asarray(normal(*y.shape, seed=9), y.dtype))]


def assert_close(got, wanted, tolerance):
    for one, other in zip(got, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


# float32: other orders of summation, nothing else. bfloat16: its rounding, 2**-8.
DTYPES = [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)]


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_outer_product_in_either_order(shape):
    a, b = normal(2, 11, shape[0]), normal(2, 11, shape[1], seed=1)
    np.testing.assert_allclose(jax.jit(cpu.outer)(a, b), np.einsum("bni,bnj->bij", a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("features", "inputs"), [((3, 2, 4), 1), ((5,), 2), ((64,), 1)])
def test_linear(features, inputs, dtype, tolerance):
    x = jnp.asarray(normal(2, 7, 4, 6), dtype)
    variables = Linear(features, inputs).init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape, seed=1), variables)
    got, wanted = (
        value_and_gradients(lambda v, x, p=p: Linear(features, inputs, dtype, platform=p).apply(v, x), variables, x)
        for p in ("cpu", "tpu")
    )
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_layer_norm(dtype, tolerance):
    x = jnp.asarray(3 + 2 * normal(2, 7, 24), dtype)
    variables = {"params": {"scale": 1 + normal(24, seed=1), "bias": normal(24, seed=2)}}
    got, wanted = (
        value_and_gradients(lambda v, x, p=p: layer_norm(dtype, None, p).apply(v, x), variables, x)
        for p in ("cpu", "tpu")
    )
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), 10 * tolerance)
    initial = [layer_norm(dtype, None, p).init(jax.random.key(0), x) for p in ("cpu", "tpu")]
    jax.tree.map(np.testing.assert_array_equal, *initial)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("tokens", [3, 20])  # fewer and more than a head has channels
def test_attention(tokens, dtype, tolerance):
    x = jnp.asarray(normal(2, tokens, 24), dtype)
    variables = jax.tree.map(lambda leaf: 3 * leaf, Attention(3).init(jax.random.key(0), x))
    got, wanted = (
        value_and_gradients(lambda v, x, p=p: Attention(3, dtype, p).apply(v, x), variables, x) for p in ("cpu", "tpu")
    )
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), 5 * tolerance)


def test_gelu_is_exact():
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    wide = x.astype(np.float64)
    phi = 0.5 * (1 + erf(wide / np.sqrt(2)))
    np.testing.assert_allclose(gelu(x), wide * phi, rtol=0, atol=1e-6)
    slope = phi + wide * np.exp(-0.5 * wide**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(jnp.asarray(x)), slope, rtol=0, atol=1e-6)
    # Not computed in bfloat16, which has no digits left for 1 + erf(-3).
    low = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(low, np.float64)
    exact = exact * 0.5 * (1 + erf(exact / np.sqrt(2)))
    np.testing.assert_allclose(np.asarray(gelu(low), np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "dtype", "channels", "fused"),
    [
        ("gpu", jnp.bfloat16, 64, True),
        ("gpu", jnp.float16, 32, True),
        ("gpu", jnp.bfloat16, 128, True),
        ("gpu", jnp.float32, 64, False),
        ("gpu", jnp.bfloat16, 136, False),
        ("gpu", jnp.bfloat16, 12, False),
        ("tpu", jnp.bfloat16, 64, False),
        ("cpu", jnp.bfloat16, 64, False),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_cudnn_is_asked_for_only_where_it_can(platform, dtype, channels, fused, installed, monkeypatch):
    if installed:
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jnp.zeros((2, 50, 3, channels), dtype)

    def loss(q):
        return attend(q, q, q, platform).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert ("cudnn$fmha" in lowered) == (fused and installed)


def test_platforms_train_alike():
    x = normal(2, 9, 24)
    blocks = [layers.Blocks(2, 3, platform=platform) for platform in ("cpu", "tpu")]
    variables = blocks[0].init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, blocks[1].init(jax.random.key(0), x))
    got, wanted = (value_and_gradients(lambda v, x, b=b: b.apply(v, x)[0], variables, x) for b in blocks)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), 1e-5)
