"""Regress the largest principal components of the hidden patches (arXiv 2111.06377, Table 1d, "PCA").

The paper predicts an eighth of a patch's coefficients: 96 of 768. Their squared error is that of the pixels within the
components' subspace, whatever basis it has; so the network predicts pixels, as ever, and the rest of them is left free.
The subspace is that of the patches of the batch: nothing is fitted beforehand, and nothing has to be kept.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from maejax.models import CrossDecoder, Decoder, ViT
from maejax.models.layers import normalize, patchify, take
from maejax.objectives.mae import decode, normalize_patches

SHARE = 8  # a patch has so many times more numbers than components


def principal_components(patches: Array, count: int) -> Array:
    """The directions (x, count) in which patches (b n x) vary most: orthonormal, the largest last."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(jnp.float32)
    centered = flat - flat.mean(axis=0, keepdims=True)
    covariance = jnp.matmul(centered.T, centered, precision="highest") / len(flat)
    return jnp.linalg.eigh(covariance)[1][:, -count:]


class PrincipalComponents(nn.Module):
    """The mean squared error of the masked patches' largest components.

    Batches are those of `mae.MaskedAutoencoder`. There is no `predict`, hence no pictures: pixels outside the subspace
    mean nothing.
    """

    fresh: ClassVar[tuple[str, ...]] = ()

    encoder: ViT
    decoder: Decoder | CrossDecoder
    norm_pix: bool = False  # components of normalised patches; the paper's are of plain ones

    def __call__(self, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The loss, a float32 scalar, and metrics by name."""
        pixels = normalize(batch["image"], self.encoder.mean, self.encoder.std)
        patches = patchify(pixels, self.encoder.patch)
        if self.norm_pix:
            patches, _, _ = normalize_patches(patches)
        components = jax.lax.stop_gradient(principal_components(patches, max(patches.shape[-1] // SHARE, 1)))
        masked = batch["masked"]
        predicted = decode(self.encoder, self.decoder, pixels, batch["visible"], masked)
        error = jnp.matmul(predicted - take(patches, masked), components)  # b m count
        return jnp.square(error).mean(), {}

    def features(self, images: Array) -> Array:
        """Tokens of the whole image (b [1+]n d), deterministic."""
        return self.encoder(images)
