"""A decoder whose mask tokens look at what the encoder has seen, and not at each other (CrossMAE, arXiv 2401.14391).

Hidden patches are predicted independently of each other, each from the visible ones alone, so any subset of them may
be decoded without changing what is made of the others. Every block reads a mixture of its own of all encoder blocks'
outputs. Another network than the paper's (arXiv 2111.06377): an option.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from maejax.models.layers import REMAT, Linear, Mlp, all_but_gathered, attend, layer_norm, sincos_positions, take
from maejax.tree import PyTree


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory of another width: (b m d), (b s e) -> (b m d)."""

    heads: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array, memory: Array) -> Array:
        d = x.shape[-1]
        q = Linear((self.heads, d // self.heads), dtype=self.dtype, platform=self.platform, name="q")(x)
        kv = Linear((2, self.heads, d // self.heads), dtype=self.dtype, platform=self.platform, name="kv")(memory)
        y = attend(q, kv[:, :, 0], kv[:, :, 1], self.platform)
        return Linear((d,), inputs=2, dtype=self.dtype, platform=self.platform, name="proj")(y)


class CrossBlock(nn.Module):
    """A pre-norm block of cross-attention and MLP, (b m d), (b s e) -> (b m d)."""

    heads: int
    dtype: DTypeLike = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array, memory: Array) -> Array:
        how = (self.dtype, self.platform)
        memory = layer_norm(self.dtype, "norm_memory", self.platform)(memory)
        y = layer_norm(self.dtype, "norm1", self.platform)(x)
        x = x + CrossAttention(self.heads, *how, name="attn")(y, memory)
        y = layer_norm(self.dtype, "norm2", self.platform)(x)
        return x + Mlp(4 * x.shape[-1], *how, name="mlp")(y)


class CrossBlocks(nn.Module):
    """One block after the other, each with a memory of its own: (b m d), (l b s e) -> (b m d), l blocks.

    Parameters are stacked, and `scan`, `remat` and `gather` mean what they mean in `layers.Blocks`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"
    gather: Callable[[PyTree], PyTree] | None = None
    platform: str = "cpu"

    @nn.compact
    def __call__(self, x: Array, memories: Array) -> Array:
        block = CrossBlock(self.heads, self.dtype, self.platform, parent=None)

        def new(key: Array) -> PyTree:
            keys = jax.random.split(key, len(memories))
            return jax.vmap(lambda key: block.init(key, x[:1], memories[0, :1])["params"])(keys)

        stack = self.param("block", new)

        def body(x: Array, layer: tuple[PyTree, Array]) -> tuple[Array, None]:
            params = layer[0] if self.gather is None else self.gather(layer[0])
            return block.apply({"params": params}, x, layer[1]), None

        if self.remat != "none" or self.gather is not None:
            body = jax.checkpoint(body, policy=REMAT[self.remat] or all_but_gathered, prevent_cse=not self.scan)
        return jax.lax.scan(body, x, (stack, memories), unroll=1 if self.scan else len(memories))[0]


class CrossDecoder(nn.Module):
    """Tokens of the encoder's blocks to one prediction per masked patch.

    A query is the mask token at its patch's position. Decoder block i reads sum_j mix[i, j] * (output of encoder block
    j), normalised; the `mix` is learned, and starts from N(0, 1 / number of encoder blocks). So the
    encoder's own last LayerNorm has no gradient here, and stays what it is at first: without scale and shift.
    """

    reads_blocks: ClassVar[bool] = True

    pixels: int  # of one patch: p * q * c
    width: int = 512
    depth: int = 8
    heads: int = 16
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"
    gather: Callable[[PyTree], PyTree] | None = None
    platform: str = "cpu"

    @nn.compact
    def __call__(self, tokens: Array, visible: Array, masked: Array, grid: tuple[int, int]) -> Array:
        """(l b s d), or (b s d) of one block, and int32 (b m) -> float32 (b m p*q*c); where tokens lie they know."""
        outputs = tokens[None] if tokens.ndim == 3 else tokens
        start = nn.initializers.normal(1 / math.sqrt(len(outputs)))
        mix = self.param("mix", start, (self.depth, len(outputs))).astype(self.dtype)
        # All at once: the encoder's outputs are read once, not once for every block.
        memories = jnp.einsum("kl,lbsd->kbsd", mix, outputs, preferred_element_type=jnp.float32).astype(self.dtype)
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        positions = jnp.asarray(sincos_positions(grid, self.width))[None]
        places = take(jnp.broadcast_to(positions, (len(masked), *positions.shape[1:])), masked)
        blocks = CrossBlocks(
            self.heads, self.dtype, self.scan, self.remat, self.gather, self.platform, name="blocks"
        )  # fmt: skip
        x = blocks((token + places).astype(self.dtype), memories)
        x = layer_norm(self.dtype, "norm", self.platform)(x)
        return Linear((self.pixels,), dtype=self.dtype, platform=self.platform, name="pred")(x).astype(jnp.float32)
