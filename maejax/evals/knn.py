"""k-nearest-neighbor classification on frozen features: exact, by matrix products and top-k on the devices.

Plain cosine neighbors are known to do badly on MAE features, whose dimensions differ in scale by orders of magnitude.
So features are standardised first, by the training split's statistics; then they vote with weight exp(similarity / T).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from maejax.errors import UsageError

CHUNK = 1024  # test images that are compared with all training images at a time


def knn(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.2,
) -> float:
    """Test accuracy in [0, 1].

    Args:
      train, test: features (n d) and labels (n).
      num_classes: labels are 0 .. num_classes - 1.
      k: neighbors that vote.
      temperature: T in exp(cosine similarity / T), the weight of a vote.

    Raises:
      UsageError: there are fewer training images than neighbors.
    """
    if k > len(train[0]):
        raise UsageError(f"k={k} neighbors are more than the {len(train[0])} training images; leave knn out")
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    keys, queries = (_unit((x - mean) / std) for x in (train[0], test[0]))
    vote = functools.partial(_vote, num_classes=num_classes, k=k, temperature=temperature)
    right = 0
    for start in range(0, len(queries), CHUNK):
        chunk = queries[start : start + CHUNK]
        padded = np.pad(chunk, ((0, CHUNK - len(chunk)), (0, 0)))  # one shape, compiled once
        predicted = np.asarray(jax.device_get(vote(padded, keys, train[1])))[: len(chunk)]
        right += int((predicted == test[1][start : start + CHUNK]).sum())
    return right / len(queries)


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "temperature"))
def _vote(queries: Array, keys: Array, labels: Array, *, num_classes: int, k: int, temperature: float) -> Array:
    """Predicted classes (b) of unit vectors (b d), from the unit vectors (n d) and labels (n) of known images."""
    similarity, nearest = jax.lax.top_k(queries @ keys.T, k)
    weights = jnp.exp(similarity / temperature)
    votes = jax.nn.one_hot(labels[nearest], num_classes) * weights[:, :, None]
    return votes.sum(axis=1).argmax(axis=-1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
