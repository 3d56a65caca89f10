"""The Vision Transformer encoder, shown all patches of an image or only the visible ones (paper, section 3)."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from maejax.models.layers import Blocks, Linear, layer_norm, normalize, patchify, sincos_positions, take


class ViT(nn.Module):
    """Images to tokens.

    As in the paper, masked patches are dropped after their embedding is positioned, not replaced: with three quarters
    hidden the encoder works on a quarter of the tokens. Positions are the fixed sine-cosine table, computed for the
    image at hand, so any size that the patch divides works. Nothing here is random.
    """

    patch: tuple[int, int]
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cls_token: bool = True
    mask_tokens: bool = False  # put mask tokens where patches are hidden, instead of dropping them (Table 1c)
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    dtype: DTypeLike = jnp.float32
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Array, visible: Array | None = None) -> Array:
        """Tokens (b [1+]v d), the class token first if there is one.

        Args:
          images: (b h w c), uint8, or float32 that is normalised already.
          visible: int32 (b v), which patches to look at; None for all of them.
        """
        if images.dtype == jnp.uint8:
            images = normalize(images, self.mean, self.std)
        patches = patchify(images, self.patch)
        b, n, pixels = patches.shape
        grid = (images.shape[1] // self.patch[0], images.shape[2] // self.patch[1])
        positions = jnp.asarray(sincos_positions(grid, self.width))[None]  # 1 n d
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

        if self.cls_token:  # its position is zero
            token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (b, 1, self.width)), x], axis=1)
        x = Blocks(self.depth, self.heads, self.mlp_ratio, self.dtype, scan=self.scan, remat=self.remat, name="blocks")(
            x
        )
        return layer_norm(self.dtype, "norm")(x)


def pool(tokens: Array, how: str, cls_token: bool) -> Array:
    """(b [1+]n d) -> (b d): the class token ("cls") or the mean of the patch tokens ("mean")."""
    if how == "cls":
        if not cls_token:
            raise ValueError('pool="cls" needs an encoder with a class token; use pool="mean"')
        return tokens[:, 0]
    if how == "mean":
        return tokens[:, int(cls_token) :].mean(axis=1)
    raise ValueError(f'pool={how!r} is not one of "cls", "mean"')
