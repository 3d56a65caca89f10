"""An encoder to use in Python: from a run, or from a folder or file that `maejax convert` reads."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from maejax import build
from maejax import config as configs
from maejax.check import check
from maejax.convert import adapt
from maejax.convert.infer import Hints
from maejax.convert.read import read
from maejax.convert.weights import Weights, fixed_table, is_run, of_run
from maejax.errors import UsageError
from maejax.models.vit import pool as pooled
from maejax.tree import PyTree

Sides = int | Sequence[int]


class Features(nn.Module):
    """An encoder whose tokens are pooled, or taken from inside; its parameters are the encoder's."""

    encoder: nn.Module
    pool: str | None = None  # "cls", "mean" or None: all tokens
    layers: tuple[int, ...] | None = None  # blocks, from 0 or from -1 backwards; None: after the last one and its norm

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)

    def __call__(self, images: Array) -> Array:
        """Images (b h w c) -> (b d) or (b [1+]n d), with `layers` (len(layers) b ...)."""
        encoder: Any = self.encoder
        tokens = encoder(images) if self.layers is None else encoder(images, layers=self.layers)
        if self.pool is None:
            return tokens
        how, cls = self.pool, encoder.cls_token
        return pooled(tokens, how, cls) if self.layers is None else jax.vmap(lambda x: pooled(x, how, cls))(tokens)


def load_encoder(
    source: str | Path,
    *,
    pool: str | None = None,
    layers: Sequence[int] | None = None,
    image_size: Sides | None = None,
    patch: Sides | None = None,
    channels: int | None = None,
) -> tuple[nn.Module, PyTree]:
    """The encoder of a run (its newest intact weights), or of weights in any format that `maejax convert` reads.

    `encoder.apply({"params": params}, images)` maps images (b h w c), uint8 or already normalised float32, to tokens
    (b [1+]n d): the class token first, then all patches, none masked. Nothing is random.

    Args:
      pool: "cls" or "mean" (of the patches): one vector an image, (b d).
      layers: blocks, counted from 0 or from -1 backwards, whose outputs are wanted: (len(layers) b ...).
      image_size, patch, channels: what to adapt the encoder to, if not what it was trained with; sides are one
        number or (height, width). Position tables are resampled to the new grid. (Without this, an encoder with fixed
        positions takes images of any size that the patch divides, with the sine-cosine table of that size.)

    Raises:
      UsageError: there is no encoder in `source`, or it does not have what is asked for.
      NoValidCheckpoint: none of the run's checkpoints is intact.
    """
    source = Path(source)
    # A decoder's targets play no part here, so any answer will do where a file does not say.
    weights = of_run(source, ("encoder",)) if is_run(source) else read(source, Hints(norm_pix=True))
    if not weights.parts & {"encoder"}:
        raise UsageError(f"{source} has no encoder")
    weights = adapted(weights, image_size=image_size, patch=patch, channels=channels)
    objective: Any = build.make_objective(weights.config, platform=jax.devices()[0].platform)
    encoder, params = objective.encoder, jax.tree.map(jax.numpy.asarray, weights.tree["encoder"])
    if pool not in (None, "cls", "mean") or (pool == "cls" and not encoder.cls_token):
        raise UsageError(f'pool={pool!r} must be None, "mean" or, with a class token, "cls"')
    for layer in layers or ():
        if not -encoder.depth <= layer < encoder.depth:
            raise UsageError(f"layers={list(layers or ())}: the encoder has blocks 0 to {encoder.depth - 1}")
    if pool is None and layers is None:
        return encoder, params
    return Features(encoder.clone(parent=None), pool, None if layers is None else tuple(layers)), params


def adapted(weights: Weights, *, image_size: Sides | None, patch: Sides | None, channels: int | None) -> Weights:
    """The encoder for other images: see `convert.adapt` for how."""
    if image_size is None and patch is None and channels is None:
        return weights
    c, arrays = configs.from_dict(configs.to_dict(weights.config)), dict(weights.arrays)
    before = build.shapes_of(c)
    with c.unlocked():
        if channels is not None and channels != before.channels:
            c.data.channels = channels
            c.data.mean, c.data.std = ((sum(v) / len(v),) for v in (c.data.mean, c.data.std))
        if image_size is not None:
            c.image_size = _sides(image_size)
        if patch is not None:
            c.model.patch = _sides(patch)
    check(c)
    after = build.shapes_of(c)
    kernel = adapt.adapt_channels(arrays["encoder/embed/kernel"], before.channels, after.channels)
    arrays["encoder/embed/kernel"] = adapt.resample_patches(kernel, before.patch, after.patch)
    if before.grid != after.grid:
        c, arrays["encoder/pos_embed"] = _resampled(c, arrays, before.grid, after.grid)
    return dataclasses.replace(weights, config=c, arrays=arrays)


def _resampled(c: ConfigDict, arrays: dict[str, np.ndarray], old: tuple[int, int], new: tuple[int, int]) -> Any:
    table = arrays.get("encoder/pos_embed", fixed_table(old, build.encoder_size(c)[0], c.model.cls_token))
    with c.unlocked():
        c.model.positions = "learned"
    return c, adapt.resample_positions(table, old, new, cls_token=c.model.cls_token)


def _sides(value: Sides) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
