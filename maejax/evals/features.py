"""Frozen features of a whole split: every image once, unmasked, center crop."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from maejax.mesh import to_global
from maejax.tree import PyTree

Encode = Callable[[PyTree, Array], Array]  # weights, images (b h w c) -> features (b d)


def extract(
    encode: Encode, weights: PyTree, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (n d) and labels int32 (n) of the valid images, in order.

    `encode` must be jitted; batches are padded to one size, with `valid` (b) False on the padding.
    """
    features, labels = [], []
    for batch in batches:
        images = to_global({"image": batch["image"]}, mesh)["image"]
        values = np.asarray(jax.device_get(encode(weights, images)), np.float32)
        features.append(values[batch["valid"]])
        labels.append(batch["label"][batch["valid"]])
    return np.concatenate(features), np.concatenate(labels)
