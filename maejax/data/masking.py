"""Which patches are shown. A mask is data: two arrays of indices, made here and only consumed by the model.

A sampler draws bool (n,), True where a patch is shown, of n = rows * columns patches. Every one hides an exact number
of patches in every image (paper, section 3 and Table 1f). Not all that is hidden must be decoded: `Mask.decoded` hands
over a random part of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Sampler = Callable[[np.random.Generator, tuple[int, int], int], np.ndarray]


def num_visible(n: int, ratio: float) -> int:
    """How many of `n` patches stay visible: floor(n * (1 - ratio)), at least 1 and at most n - 1.

    The official code's int(n * (1 - ratio)), without its rounding error: 10 of 100 at ratio 0.9, not 9.
    """
    return min(max(math.floor(n * (1 - ratio) + 1e-6), 1), n - 1)


def num_decoded(masked: int, subset: float) -> int:
    """How many of `masked` patches are decoded: ceil(masked * subset)."""
    return math.ceil(masked * subset - 1e-6)


def random(rng: np.random.Generator, grid: tuple[int, int], visible: int) -> np.ndarray:
    """Uniformly without replacement: patches in random order, of which the first ones are shown."""
    return rng.permutation(grid[0] * grid[1]) < visible


def block(rng: np.random.Generator, grid: tuple[int, int], visible: int) -> np.ndarray:
    """Hides rectangles of random size and aspect (0.3 to 1/0.3) until enough is hidden, as BEiT does.

    The last rectangle is cut to the exact number by showing some of its newly hidden patches.
    """
    rows, columns = grid
    hidden = np.zeros(grid, bool)
    wanted = rows * columns - visible
    while (left := wanted - int(hidden.sum())) > 0:
        area = rng.uniform(min(16, left), max(left, 16))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h = min(max(round(math.sqrt(area * aspect)), 1), rows)
        w = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top, start = int(rng.integers(rows - h + 1)), int(rng.integers(columns - w + 1))
        fresh = np.zeros(grid, bool)
        fresh[top : top + h, start : start + w] = True
        fresh &= ~hidden
        places = np.flatnonzero(fresh)
        hidden.reshape(-1)[places[: min(left, len(places))]] = True
    return ~hidden.reshape(-1)


def grid(rng: np.random.Generator, grid: tuple[int, int], visible: int) -> np.ndarray:
    """Shows a regular lattice: at ratio 0.75 on even grids exactly one patch of every 2 x 2.

    In general the cells' places are filled one after the other, in an order drawn for every image, so that training
    sees every position; a place that is only partly filled is filled at random.
    """
    first = rng.permutation(4).reshape(2, 2)  # in which order the four places of a 2 x 2 cell are filled
    rows, columns = np.indices(grid) % 2
    order = first[rows, columns].reshape(-1)
    shown = np.zeros(len(order), bool)
    shown[np.lexsort((rng.random(len(order)), order))[:visible]] = True
    return shown


SAMPLERS: dict[str, Sampler] = {"random": random, "block": block, "grid": grid}


def as_indices(shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool (n,) -> the visible patches (v,) and the masked ones (m,), int32 and ascending."""
    return shown.nonzero()[0].astype(np.int32), (~shown).nonzero()[0].astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Adds `visible` (v,) and `masked` (m,), int32 and ascending, to an example.

    `decoded`: how many hidden patches are handed over as `masked`, drawn uniformly whatever the sampler; None: all.
    """

    sampler: str
    grid: tuple[int, int]
    visible: int
    decoded: int | None = None

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Draws a mask of its own for every example."""
        visible, masked = as_indices(SAMPLERS[self.sampler](rng, self.grid, self.visible))
        if self.decoded is not None and self.decoded < len(masked):  # drawn last: visible patches are the same ones
            masked = np.sort(rng.permutation(masked)[: self.decoded])
        return example | {"visible": visible, "masked": masked}


def masks_for(
    count: int, *, grid: tuple[int, int], num_visible: int, sampler: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` fixed masks: visible (b v) and masked (b m)."""
    rng = np.random.default_rng(seed)
    masks = [as_indices(SAMPLERS[sampler](rng, grid, num_visible)) for _ in range(count)]
    visible, masked = zip(*masks, strict=True)
    return np.stack(visible), np.stack(masked)
