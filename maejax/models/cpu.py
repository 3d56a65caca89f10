"""Linear layers, norms and attention as XLA:CPU runs them fastest: the functions of `layers`, with derivatives by hand.

What autodiff makes of them is right, but slow there: products that contract the first axis of both operands with the
wider one on the left, sums over rows in loops of their own, and attention's heads in places where its small products
leave the matrix routines. benchmarks/NOTES.md has what each is worth.

Axes: n rows (images times tokens), d and f widths, b batch, h heads, s tokens, c channels of a head.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

NORM_EPS = 1e-6


def outer(a: Array, b: Array) -> Array:
    """(... n d), (... n f) -> (... d f): a^T b, summed over n.

    The narrower one is transposed first, into an array of its own: left to XLA, the product of two that are contracted
    over their rows leaves the fast routines.
    """
    if a.shape[-1] > b.shape[-1]:
        return jnp.swapaxes(jax.lax.optimization_barrier(outer(b, a)), -1, -2)
    return jax.lax.optimization_barrier(jnp.swapaxes(a, -1, -2)) @ b


def column_sums(x: Array) -> Array:
    """(n d) -> (d), as a product: several times as fast as a reduction over rows."""
    return (jnp.ones((1, x.shape[0]), x.dtype) @ x)[0]


@jax.custom_vjp
def linear(x: Array, kernel: Array, bias: Array) -> Array:
    """(n d), (d f), (f) -> (n f)."""
    return x @ kernel + bias[None]


def _linear_fwd(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel, bias), (x, kernel)


def _linear_bwd(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel = kept
    return g @ kernel.T, outer(x, g), column_sums(g)


linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """(n d), (d), (d) -> float32 (n d). Only the input is kept for the backward pass, and two numbers a row."""
    return _norm_fwd(x, scale, bias)[0]


def _norm_fwd(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + NORM_EPS)
    return (wide - mean) * (rstd * scale[None]) + bias[None], (x, mean, rstd, scale)


def _norm_bwd(kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, mean, rstd, scale = kept
    normal = (x.astype(jnp.float32) - mean) * rstd
    weights = (scale / x.shape[-1])[:, None]
    dx = (g * scale[None] - g @ weights - normal * ((g * normal) @ weights)) * rstd
    return dx.astype(x.dtype), column_sums(g * normal), column_sums(g)


layer_norm.defvjp(_norm_fwd, _norm_bwd)


def _dot(a: Array, b: Array, i: int, j: int, dtype: DTypeLike | None = None) -> Array:
    """Product of (b h . .) and (b h . .), contracted over axes i and j."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


@jax.custom_vjp
def attend(qkv: Array) -> Array:
    """Softmax self-attention, (b s 3 h c) -> (b s h c). The weights are kept for the backward pass."""
    return _attend_fwd(qkv)[0]


def _attend_fwd(qkv: Array) -> tuple[Array, tuple[Array, ...]]:
    # One by one: XLA:CPU transposes the whole at half the speed.
    q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
    q = q * (q.shape[-1] ** -0.5)
    weights = jax.nn.softmax(_dot(q, k, 3, 3, jnp.float32), axis=-1).astype(v.dtype)
    return jnp.swapaxes(_dot(weights, v, 3, 2), 1, 2), (q, k, v, weights)


def _attend_bwd(kept: tuple[Array, ...], g: Array) -> tuple[Array]:
    q, k, v, weights = kept
    g = jnp.swapaxes(g, 1, 2)
    dweights = _dot(g, v, 3, 3, jnp.float32)
    wide = weights.astype(jnp.float32)
    dlogits = (wide * (dweights - (wide * dweights).sum(axis=-1, keepdims=True))).astype(q.dtype)
    parts = _dot(dlogits, k, 3, 2) * (q.shape[-1] ** -0.5), outer(dlogits, q), outer(weights, g)
    return (jnp.stack(jax.lax.optimization_barrier([jnp.swapaxes(part, 1, 2) for part in parts]), axis=2),)


attend.defvjp(_attend_fwd, _attend_bwd)
