"""Frozen features of a whole split: every image once, unmasked, center crop."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax import Array
from jax.sharding import Mesh

from maejax.mesh import to_global
from maejax.processes import fetch
from maejax.tree import PyTree

Encode = Callable[[PyTree, Array], Array]  # weights, images (b h w c) -> features (b d)


def extract(
    encode: Encode,
    weights: PyTree,
    batches: Iterator[Mapping[str, np.ndarray]],
    mesh: Mesh,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (n d) and labels int32 (n) of the valid images, in order.

    `encode` must be jitted; batches are this process's rows, padded to one size, with `valid` (b) False on the padding.
    """
    features, labels = [], []
    for batch in batches:
        before_batch()
        whole = to_global({key: batch[key] for key in ("image", "label", "valid")}, mesh)
        values, label, valid = (fetch(x) for x in (encode(weights, whole["image"]), whole["label"], whole["valid"]))
        features.append(values.astype(np.float32)[valid])
        labels.append(label[valid])
    return np.concatenate(features), np.concatenate(labels)
