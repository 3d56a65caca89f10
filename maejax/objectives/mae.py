"""Masked autoencoding: hide most patches, encode the rest, regress the hidden pixels (arXiv 2111.06377, section 3)."""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from maejax.models import CrossDecoder, Decoder, ViT
from maejax.models.layers import normalize, patchify, take

TARGET_EPS = 1e-6  # added to a patch's variance, as the official code does


def normalize_patches(patches: Array) -> tuple[Array, Array, Array]:
    """Each patch (... p*q*c) minus its mean, over its deviation (unbiased variance, ddof 1); then both of these."""
    mean = patches.mean(axis=-1, keepdims=True)
    std = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + TARGET_EPS)
    return (patches - mean) / std, mean, std


def decode(encoder: ViT, decoder: Decoder | CrossDecoder, images: Array, visible: Array, masked: Array) -> Array:
    """What a decoder says of the masked patches, float32 (b m p*q*c), of normalised images (b h w c)."""
    grid = (images.shape[1] // encoder.patch[0], images.shape[2] // encoder.patch[1])
    layers = range(encoder.depth) if decoder.reads_blocks else None
    return decoder(encoder(images, visible, layers=layers), visible, masked, grid)


class MaskedAutoencoder(nn.Module):
    """The mean squared error over the masked patches of a batch.

    A batch has `image` uint8 (b h w c), `visible` int32 (b v) and `masked` int32 (b m), which together hold every patch
    once; or `masked` is a subset of the hidden ones, to be decoded alone. Masking is data: nothing is drawn here.
    """

    fresh: ClassVar[tuple[str, ...]] = ()

    encoder: ViT
    decoder: Decoder | CrossDecoder
    norm_pix: bool = True  # regress patches normalised by their own mean and deviation (Table 1d)

    def __call__(self, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The loss, a float32 scalar, and metrics by name."""
        pixels = normalize(batch["image"], self.encoder.mean, self.encoder.std)
        target = take(patchify(pixels, self.encoder.patch), batch["masked"])
        if self.norm_pix:
            target, _, _ = normalize_patches(target)
        predicted = self.predict(pixels, batch["visible"], batch["masked"])
        # Every image hides the same number of patches, so the mean over all is the mean over images of their means.
        loss = jnp.square(predicted - target).mean()
        return loss, {}

    def predict(self, images: Array, visible: Array, masked: Array) -> Array:
        """What the network makes of the masked patches: float32 (b m p*q*c), in the units of the target."""
        return decode(self.encoder, self.decoder, images, visible, masked)

    def features(self, images: Array) -> Array:
        """Tokens of the whole image (b [1+]n d), deterministic."""
        return self.encoder(images)


def train_flops(
    *, patches: int, visible: int, pixels: int, width: int, depth: int, mlp_ratio: float, cls_token: bool,
    mask_tokens: bool, decoder_width: int, decoder_depth: int, decoded: int | None = None, cross: bool = False,
) -> float:  # fmt: skip
    """Floating-point operations (2 a multiply-add) that one image costs in one training step, without remat.

    Matrix products and attention, forward and twice that backward; the patch embedding has no gradient of its input.
    `decoded`: how many masked patches are; None: all of them. `cross`: by a `CrossDecoder`.
    """
    extra, e = int(cls_token), decoder_width
    encoded = (patches if mask_tokens else visible) + extra
    decoded = patches - visible if decoded is None else decoded

    def transformer(tokens: int, d: int, layers: int, ratio: float) -> float:
        return layers * ((8 + 4 * ratio) * tokens * d * d + 4 * tokens * tokens * d)

    if cross:  # queries, output and MLP; keys and values; attention; the mixture of the encoder's blocks
        block = (
            20.0 * decoded * e * e + 4 * encoded * width * e + 4 * decoded * encoded * e + 2 * depth * encoded * width
        )
        decoder = block * decoder_depth
    else:
        decoder = transformer(visible + extra + decoded, e, decoder_depth, 4.0) + 2 * encoded * width * e
    forward = transformer(encoded, width, depth, mlp_ratio) + decoder + 2 * decoded * e * pixels
    embed = 2 * (encoded - extra) * pixels * width
    return 3 * forward + 2 * embed
