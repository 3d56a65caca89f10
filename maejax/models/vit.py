"""The Vision Transformer encoder, shown all patches of an image or only the visible ones (paper, section 3)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from maejax.models.layers import Blocks, Linear, layer_norm, normalize, patchify, sincos_positions, take
from maejax.tree import PyTree


class ViT(nn.Module):
    """Images to tokens.

    As in the paper, masked patches are dropped after their embedding is positioned, not replaced: with three quarters
    hidden the encoder works on a quarter of the tokens. Nothing is random, unless a generator "dropout" is given and
    `drop_path` is not 0.
    """

    patch: tuple[int, int]
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cls_token: bool = True
    mask_tokens: bool = False  # put mask tokens where patches are hidden, instead of dropping them (Table 1c)
    # "fixed": the sine-cosine table, computed for the image at hand, so any size that the patch divides works.
    # "learned": a parameter that starts as that table, as the official fine-tuning has it.
    positions: str = "fixed"
    norm: bool = True  # a LayerNorm after the last block
    drop_path: float = 0.0  # chance that an image skips a branch of the last block; less before it
    trained: int | None = None  # how many of the last blocks get a gradient; None: everything does
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"
    gather: Callable[[PyTree], PyTree] | None = None
    platform: str = "cpu"

    @nn.compact
    def __call__(self, images: Array, visible: Array | None = None, *, layers: Sequence[int] | None = None) -> Array:
        """Tokens (b [1+]v d), the class token first if there is one.

        Args:
          images: (b h w c), uint8, or float32 that is normalised already.
          visible: int32 (b v), which patches to look at; None for all of them.
          layers: blocks, counted from 0 or from -1 backwards; their outputs (len(layers) b [1+]v d), not normalised,
            are returned instead of the last one's.
        """
        if images.dtype == jnp.uint8:
            images = normalize(images, self.mean, self.std)
        patches = patchify(images, self.patch)
        b, n, pixels = patches.shape
        grid = (images.shape[1] // self.patch[0], images.shape[2] // self.patch[1])
        first, positions = self._positions(grid)  # d, 1 n d
        # The official patch embedding is a convolution, whose bias PyTorch starts in U(+-1/sqrt(fan_in)).
        embed = Linear((self.width,), dtype=self.dtype, bias_limit=1 / math.sqrt(pixels), name="embed")

        if visible is None:
            x = embed(patches) + positions.astype(self.dtype)
        elif self.mask_tokens:
            token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            shown = jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], visible].set(True)
            x = jnp.where(shown[:, :, None], embed(patches), token.astype(self.dtype)) + positions.astype(self.dtype)
        else:
            places = take(jnp.broadcast_to(positions, (b, n, self.width)), visible)
            x = embed(take(patches, visible)) + places.astype(self.dtype)

        if self.cls_token:
            token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)) + first
            x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (b, 1, self.width)), x], axis=1)
        blocks = Blocks(
            self.depth, self.heads, self.mlp_ratio, self.dtype, scan=self.scan, remat=self.remat,
            drop_path=self.drop_path, trained=self.trained, gather=self.gather, platform=self.platform,
            name="blocks",
        )  # fmt: skip
        x, outputs = blocks(x, collect=layers is not None)
        if self.norm:
            x = layer_norm(self.dtype, "norm")(x)
        if outputs is not None and layers is not None:
            return outputs[np.asarray(layers)]
        return jax.lax.stop_gradient(x) if self.trained == 0 else x

    def _positions(self, grid: tuple[int, int]) -> tuple[Array, Array]:
        """What is added to the class token (1 1 d) and to the patches (1 n d); the former is 0 in the fixed table."""
        table = sincos_positions(grid, self.width)[None]
        if self.positions == "fixed":
            return jnp.zeros((1, 1, self.width)), jnp.asarray(table)
        start = np.concatenate([np.zeros((1, int(self.cls_token), self.width), np.float32), table], axis=1)
        learned = self.param("pos_embed", lambda _: jnp.asarray(start))
        return learned[:, :1], learned[:, int(self.cls_token) :]


def pool(tokens: Array, how: str, cls_token: bool) -> Array:
    """(b [1+]n d) -> (b d): the class token ("cls") or the mean of the patch tokens ("mean"); (b 2d): "cls+mean"."""
    if how == "cls+mean":
        return jnp.concatenate([pool(tokens, "cls", cls_token), pool(tokens, "mean", cls_token)], axis=-1)
    if how == "cls":
        if not cls_token:
            raise ValueError('pool="cls" needs an encoder with a class token; use pool="mean"')
        return tokens[:, 0]
    if how == "mean":
        return tokens[:, int(cls_token) :].mean(axis=1)
    raise ValueError(f'pool={how!r} is not one of "cls", "mean", "cls+mean"')
