"""A transformer block as TPUs like it: the same function as `layers.Block`, of rows instead of images.

A TPU's memory has tiles of 8 tokens and 128 channels: a sequence of 50 tokens takes the room of 56, one head of 64
channels that of 128, and XLA copies activations between orders that suit one operation or the next. Tokens of all
images in one axis need no padding. The gradients are written down, so that it is decided here what is kept: the two
branches' inputs, queries with keys and values, what attention gives, and the hidden units before their GELU; norms and
GELU are computed again inside of the products that need them.

Axes: r rows, the tokens of all images one after the other; s tokens of an image; d width; f another width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from maejax.models.attention_tpu import attend_rows, fits
from maejax.tree import PyTree

EPSILON = 1e-6  # of the norms


def usable(images: int, s: int, d: int, heads: int) -> bool:
    """Whether a block of this width can work on so many images, on the mesh of the context.

    Without one, as in evaluations and pictures, XLA would have to split the kernel over devices, which it refuses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return False
    devices = max(mesh.size, 1)
    return images % devices == 0 and fits(images // devices * s, s, d, heads)


def block_rows(
    params: PyTree, x: Array, s: int, heads: int, keep: tuple[Array, Array] | None, dtype: DTypeLike
) -> Array:
    """(r d) -> (r d), with the parameters and the `keep` of `layers.Block`."""
    d = x.shape[1]

    def matrix(layer: PyTree, inputs: int) -> tuple[Array, Array]:
        return layer["kernel"].reshape(inputs, -1).astype(dtype), layer["bias"].reshape(-1).astype(dtype)

    def kept(y: Array, factors: Array | None) -> Array:
        return y if factors is None else y * jnp.repeat(factors.astype(dtype), s)[:, None]

    first, second = keep or (None, None)
    attn, mlp = params["attn"], params["mlp"]
    qkv = norm_linear(x, params["norm1"]["scale"], params["norm1"]["bias"], *matrix(attn["qkv"], d))
    x = x + kept(linear(_attend(qkv, s, heads), *matrix(attn["proj"], d)), first)
    hidden = norm_linear(x, params["norm2"]["scale"], params["norm2"]["bias"], *matrix(mlp["fc1"], d))
    return x + kept(gelu_linear(hidden, *matrix(mlp["fc2"], hidden.shape[1])), second)


def flattened(stack: PyTree) -> PyTree:
    """A stack of layers with matrices (l, inputs, outputs), as `block_rows` uses them.

    Were that left to the loop's body, the loop would hold heads of 32 or 64 channels, and turn what comes and goes.
    """
    qkv, proj = stack["attn"]["qkv"], stack["attn"]["proj"]
    depth, d = qkv["kernel"].shape[:2]
    attn = {
        "qkv": {"kernel": qkv["kernel"].reshape(depth, d, -1), "bias": qkv["bias"].reshape(depth, -1)},
        "proj": proj | {"kernel": proj["kernel"].reshape(depth, -1, d)},
    }
    return dict(stack) | {"attn": attn}


def _attend(qkv: Array, s: int, heads: int) -> Array:
    """`attend_rows` of every device's own images: XLA cannot split a kernel. The mesh is that of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend_rows(qkv, s, heads)
    rows = PartitionSpec(mesh.axis_names)
    attend = functools.partial(attend_rows, s=s, heads=heads)
    return jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(qkv)


@jax.custom_vjp
def norm_linear(x: Array, scale: Array, bias: Array, kernel: Array, shift: Array) -> Array:
    """LayerNorm, then a matrix product and a bias: (r d), (d), (d), (d f), (f) -> (r f)."""
    return _norm_linear(x, scale, bias, kernel, shift)[0]


def _norm_linear(x: Array, scale: Array, bias: Array, kernel: Array, shift: Array) -> tuple[Array, tuple[Array, ...]]:
    mean = _row_means(x.astype(jnp.float32))
    inverse = jax.lax.rsqrt(_row_means(jnp.square(x - mean)) + EPSILON)
    normed = ((x - mean) * inverse * scale[None] + bias[None]).astype(x.dtype)
    return normed @ kernel + shift[None], (x, mean, inverse, scale, bias, kernel)


def _norm_linear_back(kept: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    x, mean, inverse, scale, bias, kernel = kept
    unit = (x - mean) * inverse
    normed = (unit * scale[None] + bias[None]).astype(x.dtype)
    dnormed = _contract(grad, kernel, 1, 1).astype(jnp.float32)
    dunit = dnormed * scale[None]
    dx = inverse * (dunit - _row_means(dunit) - unit * _row_means(dunit * unit))
    return (
        dx.astype(x.dtype), (dnormed * unit).sum(0), dnormed.sum(0), _contract(normed, grad, 0, 0), _column_sums(grad),
    )  # fmt: skip


norm_linear.defvjp(_norm_linear, _norm_linear_back)


@jax.custom_vjp
def linear(x: Array, kernel: Array, shift: Array) -> Array:
    """A matrix product and a bias: (r d), (d f), (f) -> (r f)."""
    return x @ kernel + shift[None]


def _linear_back(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, kernel = kept
    return _contract(grad, kernel, 1, 1), _contract(x, grad, 0, 0), _column_sums(grad)


linear.defvjp(lambda x, kernel, shift: (linear(x, kernel, shift), (x, kernel)), _linear_back)


@jax.custom_vjp
def gelu_linear(x: Array, kernel: Array, shift: Array) -> Array:
    """The exact GELU, then a matrix product and a bias: (r f), (f d), (d) -> (r d)."""
    return jax.nn.gelu(x, approximate=False) @ kernel + shift[None]


def _gelu_linear_back(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, kernel = kept
    wide = x.astype(jnp.float32)
    # The derivative of x F(x), with F and its density that of the standard normal distribution.
    slope = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5))) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    dx = (_contract(grad, kernel, 1, 1) * slope).astype(x.dtype)
    return dx, _contract(jax.nn.gelu(x, approximate=False), grad, 0, 0), _column_sums(grad)


gelu_linear.defvjp(lambda x, kernel, shift: (gelu_linear(x, kernel, shift), (x, kernel)), _gelu_linear_back)


def _contract(a: Array, b: Array, left: int, right: int) -> Array:
    """Contracts axis `left` of `a` with axis `right` of `b`."""
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())))


def _row_means(x: Array) -> Array:
    """float32 (r d) -> (r 1), by the matrix unit: summing across a vector register's lanes takes longer than a product.

    Three passes in bfloat16 are as good as float32 here, for the ones have no digits to lose.
    """
    ones = jnp.ones((x.shape[1], 128), jnp.float32)
    return jnp.dot(x, ones, precision=jax.lax.Precision.HIGH)[:, :1] / x.shape[1]


def _column_sums(x: Array) -> Array:
    """(r f) -> (f), summed in float32, by the matrix unit, too."""
    ones = jnp.ones((8, x.shape[0]), x.dtype)
    return jnp.dot(ones, x, preferred_element_type=jnp.float32)[0].astype(x.dtype)
