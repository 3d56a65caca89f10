"""The parts that encoder and decoder share: patches, fixed positions, linear layers, attention, transformer blocks.

Initial values and formulas are those of the official MAE code, as far as they decide the function: xavier-uniform
matrices (the fused qkv counts as one), zero biases, exact GELU, LayerNorm with eps 1e-6. Parameters are float32;
activations and products have `dtype`; norms and softmax are computed in float32.

Axes: b batch, h w c image, p q patch sides, n patches, v visible, m masked, d width, s any sequence of tokens.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from maejax.models import cpu
from maejax.models.blocks_tpu import block_rows, flattened, usable
from maejax.tree import PyTree

# What the backward pass keeps of a block's forward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "none": None,  # keep all: no remat
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products of weights and activations
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the blocks' inputs
}


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (b h w c) -> float32 (b h w c): minus `mean`, over `std`, each one value or c, of pixels in [0, 1]."""
    scaled = images.astype(jnp.float32) / 255.0
    shape = (1, 1, 1, -1)
    return (scaled - np.asarray(mean, np.float32).reshape(shape)) / np.asarray(std, np.float32).reshape(shape)


def patchify(images: Array, patch: tuple[int, int]) -> Array:
    """(b h w c) -> (b n p*q*c): patches row by row, in each the order (row, column, channel) of the official code."""
    return rearrange(images, "b (r p) (s q) c -> b (r s) (p q c)", p=patch[0], q=patch[1])


def unpatchify(patches: Array, patch: tuple[int, int], grid: tuple[int, int]) -> Array:
    """(b n p*q*c) -> (b h w c), the inverse of `patchify`; `grid` is the number of patches down and across."""
    return rearrange(patches, "b (r s) (p q c) -> b (r p) (s q) c", p=patch[0], q=patch[1], r=grid[0], s=grid[1])


def take(tokens: Array, indices: Array) -> Array:
    """(b n d), int (b v) -> (b v d): of every row the tokens at its own indices."""
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """The fixed 2-D sine-cosine table, float32 (n d), of a grid of (rows, columns).

    The first half of the channels encodes the column, the second the row (the official code's "w goes first"), each as
    [sin | cos] of the place times 10000**(-i / (d/4)), i < d/4.
    """
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))  # float64

    def encode(place: np.ndarray) -> np.ndarray:
        angle = np.outer(place.reshape(-1), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def uniform(limit: float) -> Callable[..., Array]:
    """Initializer U(-limit, limit)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Linear(nn.Module):
    """(... d) -> (... *features), a matrix product and a bias.

    Contracted in two dimensions whatever the input's shape: XLA:CPU runs (b, n, d) @ (d, f) 1.5x slower than that.
    """

    features: tuple[int, ...]  # several when the output has more axes, as qkv (3, heads, channels)
    inputs: int = 1  # how many trailing axes are contracted: 2 for attention's (heads, channels)
    dtype: DTypeLike = jnp.float32
    bias_limit: float = 0.0  # biases start in U(-limit, limit)
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, contracted = x.shape[: -self.inputs], x.shape[-self.inputs :]
        # Xavier-uniform with the fans of the matrix as it is stored, so the fused qkv has fan_out 3d.
        limit = math.sqrt(6 / (math.prod(contracted) + math.prod(self.features)))
        kernel = self.param("kernel", uniform(limit), (*contracted, *self.features))
        bias = self.param("bias", uniform(self.bias_limit), self.features)
        if self.platform == "cpu":
            rows = x.reshape(math.prod(batch), math.prod(contracted)).astype(self.dtype)
            matrix = kernel.reshape(math.prod(contracted), math.prod(self.features)).astype(self.dtype)
            return cpu.linear(rows, matrix, bias.reshape(-1).astype(self.dtype)).reshape(*batch, *self.features)
        axes = tuple(range(1, self.inputs + 1)), tuple(range(self.inputs))
        x = x.reshape(math.prod(batch), *contracted).astype(self.dtype)
        y = jax.lax.dot_general(x, kernel.astype(self.dtype), (axes, ((), ())))
        return (y + bias[None].astype(self.dtype)).reshape(*batch, *self.features)


class CpuLayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis as `cpu.layer_norm` has it."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return cpu.layer_norm(x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape).astype(self.dtype)


def layer_norm(dtype: DTypeLike, name: str | None = None, platform: str = "cpu") -> nn.Module:
    """LayerNorm over the last axis, eps 1e-6; its statistics are float32 whatever `dtype` is.

    Only its input is kept for the backward pass, not two float32 arrays of that shape.
    """
    if platform == "cpu":
        return CpuLayerNorm(dtype, name=name)
    return nn.remat(nn.LayerNorm)(epsilon=cpu.NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


def attend(q: Array, k: Array, v: Array, platform: str = "cpu") -> Array:
    """Softmax attention, (b s heads channels) three times -> the same shape."""
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        with contextlib.suppress(RuntimeError):  # no cuDNN here, or not for this GPU
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return plain_attention(q, k, v)


@jax.checkpoint
def plain_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention of which nothing but q, k and v is kept for the backward pass, as fused kernels do it.

    That computes the weights again, whose float32 (b h s s) would be the largest arrays of a step.
    """
    q = q * (q.shape[-1] ** -0.5)
    logits = jnp.einsum("bshc,bthc->bhst", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bthc->bshc", weights, v)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values: (b s d) -> (b s d)."""

    heads: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        qkv = Linear((3, self.heads, d // self.heads), dtype=self.dtype, platform=self.platform, name="qkv")(x)
        if self.platform == "cpu":
            y = cpu.attend(qkv)
        else:
            y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.platform)
        return Linear((d,), inputs=2, dtype=self.dtype, platform=self.platform, name="proj")(y)


@jax.checkpoint
def gelu(x: Array) -> Array:
    """The exact GELU, in float32 whatever the type of `x`. Only `x` is kept for the backward pass."""
    wide = x.astype(jnp.float32)
    # By erf, as in PyTorch: erfc, which jax.nn.gelu has, computes two approximations and takes one.
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them: (b s d) -> (b s d)."""

    hidden: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        x = gelu(Linear((self.hidden,), dtype=self.dtype, platform=self.platform, name="fc1")(x))
        return Linear((d,), dtype=self.dtype, platform=self.platform, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block, (b s d) -> (b s d)."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array, keep: tuple[Array, Array] | None = None) -> Array:
        """`keep`: what each image's two branches are multiplied by, (b) each, from `draw_paths`; None for 1."""
        hidden = round(self.mlp_ratio * x.shape[-1])
        y = layer_norm(self.dtype, "norm1", self.platform)(x)
        y = Attention(self.heads, self.dtype, self.platform, name="attn")(y)
        x = x + (y if keep is None else y * keep[0][:, None, None].astype(y.dtype))
        y = layer_norm(self.dtype, "norm2", self.platform)(x)
        y = Mlp(hidden, self.dtype, self.platform, name="mlp")(y)
        return x + (y if keep is None else y * keep[1][:, None, None].astype(y.dtype))


def draw_paths(key: Array, rates: Array, images: int) -> tuple[Array, Array]:
    """Stochastic depth (Huang et al. 2016): 0 for a branch that an image skips, else 1 / (1 - rate).

    Two arrays (l b), for the attention and the MLP of every block; `rates` (l) are the blocks' chances of a skip.
    """
    keep = 1 - rates[:, None]
    drawn = jax.random.uniform(key, (2, len(rates), images)) < keep[None]
    factors = drawn / keep[None]
    return factors[0], factors[1]


class Blocks(nn.Module):
    """`depth` blocks one after the other, (b s d) -> (b s d).

    Their parameters are stacked along a first axis of length `depth` whether or not they run in a loop: `scan=False`
    only unrolls it. So the two have the same parameters, initial values and checkpoints.

    Nothing is random unless the caller gives a generator named "dropout": then whole branches are dropped, with chances
    that grow linearly from 0 at the first block to `drop_path` at the last.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"
    drop_path: float = 0.0
    trained: int | None = None  # how many of the last blocks get a gradient; None: all, and what comes before them
    gather: Callable[[PyTree], PyTree] | None = None  # collects a layer's parameters, which a mesh has split
    platform: str = "cpu"  # of the devices: the function is the same on all, how it is written is not

    @nn.compact
    def __call__(self, x: Array, *, collect: bool = False) -> tuple[Array, Array | None]:
        """The last block's output and, if `collect`, those of all blocks (l b s d)."""
        block = Block(self.heads, self.mlp_ratio, self.dtype, self.platform, parent=None)
        stack = self.param("block", lambda key: _init_stack(block, key, x, self.depth))
        keep = None
        if self.drop_path and self.has_rng("dropout"):
            keep = draw_paths(self.make_rng("dropout"), jnp.linspace(0, self.drop_path, self.depth), x.shape[0])

        shape = x.shape
        by_rows = self.platform == "tpu" and usable(shape[0], shape[1], shape[2], self.heads)

        if by_rows:
            x = x.reshape(-1, shape[-1])
            stack = flattened(stack) if self.gather is None else stack

        def body(x: Array, layer: tuple[PyTree, Any]) -> tuple[Array, Array | None]:
            params = layer[0] if self.gather is None else self.gather(layer[0])
            if by_rows:
                y = block_rows(params, x, shape[1], self.heads, layer[1], self.dtype)
            else:
                y = block.apply({"params": params}, x, layer[1])
            return y, y.reshape(shape) if collect else None

        if self.remat != "none" or self.gather is not None:
            policy = REMAT[self.remat] or all_but_gathered
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.scan)

        def run(x: Array, first: int, last: int) -> tuple[Array, Array | None]:
            layers = jax.tree.map(lambda leaf: leaf[first:last], (stack, keep))
            return jax.lax.scan(body, x, layers, unroll=1 if self.scan else max(last - first, 1))

        if self.trained is None:
            x, outputs = run(x, 0, self.depth)
            return x.reshape(shape), outputs
        # Below a barrier nothing is differentiated, so the backward pass of the frozen blocks is never computed.
        frozen = self.depth - self.trained
        x, below = run(x, 0, frozen)
        x, above = run(jax.lax.stop_gradient(x), frozen, self.depth)
        x = x.reshape(shape)
        if below is None or above is None:
            return x, None
        return x, jnp.concatenate([below, above])


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: the backward pass collects parameters again, and computes nothing again."""
    return bool(primitive.name != "sharding_constraint")


def _init_stack(block: Block, key: Array, x: Array, depth: int) -> PyTree:
    """Initial parameters of `depth` blocks, stacked."""
    return jax.vmap(lambda key: block.init(key, x[:1])["params"])(jax.random.split(key, depth))
