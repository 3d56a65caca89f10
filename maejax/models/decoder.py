"""The light decoder that predicts the hidden pixels from the visible tokens (paper, section 3 and Tables 1a, 1b)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from maejax.models.layers import Blocks, Linear, layer_norm, sincos_positions, take
from maejax.tree import PyTree


class Decoder(nn.Module):
    """Tokens of the visible patches to one prediction per masked patch.

    The sequence is [cls, visible, masked], each with its own position added, and not put back into image order: to a
    transformer the order is nothing but the positions, so this is the same function with two gathers fewer.
    """

    pixels: int  # of one patch: p * q * c
    width: int = 512
    depth: int = 8
    heads: int = 16
    cls_token: bool = True
    mask_tokens: bool = False  # the encoder has seen mask tokens: it hands over all patches, in image order
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"
    gather: Callable[[PyTree], PyTree] | None = None
    platform: str = "cpu"

    @nn.compact
    def __call__(self, tokens: Array, visible: Array, masked: Array, grid: tuple[int, int]) -> Array:
        """Encoder tokens (b [1+]v d), int32 (b v) and (b m) -> float32 (b m p*q*c)."""
        b, v, m = tokens.shape[0], visible.shape[1], masked.shape[1]
        x = Linear((self.width,), dtype=self.dtype, name="embed")(tokens)
        cls, x = x[:, : int(self.cls_token)], x[:, int(self.cls_token) :]
        order = jnp.concatenate([visible, masked], axis=1)
        if self.mask_tokens:
            x = take(x, order)
        else:
            token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.concatenate([x, jnp.broadcast_to(token.astype(self.dtype), (b, m, self.width))], axis=1)
        positions = jnp.asarray(sincos_positions(grid, self.width))[None]
        x = x + take(jnp.broadcast_to(positions, (b, v + m, self.width)), order).astype(self.dtype)
        x = jnp.concatenate([cls, x], axis=1)
        blocks = Blocks(
            self.depth, self.heads, dtype=self.dtype, scan=self.scan, remat=self.remat, gather=self.gather,
            platform=self.platform, name="blocks",
        )  # fmt: skip
        x, _ = blocks(x)
        x = layer_norm(self.dtype, "norm")(x[:, -m:])  # only what is regressed
        return Linear((self.pixels,), dtype=self.dtype, name="pred")(x).astype(jnp.float32)
