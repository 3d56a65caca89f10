"""The training stream, batch by batch: each row is drawn by the generator of its place, from the seed and nothing else.

With k repeats (`data.repeats`, mae_st's repeated sampling), places g * k to g * k + k - 1 of the stream are crops,
flips and masks of the one record of group g, drawn one after the other from the group's generator.

Grain is asked for whole batches: what it does for single examples (a generator for each transform, pixels copied twice)
takes as long as a crop, and keeps Python's lock from the other threads meanwhile.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from maejax.data.transforms import TRIES, copy_pixels
from maejax.errors import UsageError

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]
SMALL = 2**14  # records
NO_FAULTS = np.full(TRIES, -1, np.int64)


def stream_seed(seed: int) -> int:
    """The seed of the order. Epoch e is shuffled with this + e, so neighboring seeds would share their epochs."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class RecordOrder:
    """The number of the record at every place of the stream, without end: each epoch holds every record once.

    What Grain's `MapDataset.range(num_examples).shuffle(seed=stream_seed(seed)).repeat()` holds: a place is computed,
    not looked up, so that billions of records take no memory. Fewer than SMALL are looked up: to compute them, Grain
    tries SMALL / num_examples numbers for each.
    """

    def __init__(self, num_examples: int, seed: int):
        self._num_examples, self._seed = num_examples, stream_seed(seed)

    def __getitem__(self, place: int) -> int:
        epoch, index = divmod(place, self._num_examples)
        seed = (self._seed + epoch) % 2**32
        if self._num_examples < SMALL:
            return _shuffled(self._num_examples, seed)[index]
        return int(index_shuffle(index, max_index=self._num_examples - 1, seed=seed, rounds=4))


@functools.lru_cache(maxsize=8)
def _shuffled(num_examples: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(num_examples).tolist()


class Generators:
    """The generators of places: one, which `at` sets to where a place begins, six times as fast as making one."""

    def __init__(self, seed: int):
        self._philox = np.random.Philox(seed)
        self._generator, self._state = np.random.Generator(self._philox), self._philox.state

    def at(self, place: int) -> np.random.Generator:
        """Ends what the last place drew."""
        self._state["state"]["counter"] = np.array([0, 0, 0, place], np.uint64)  # 2^192 draws for each
        self._philox.state = self._state
        return self._generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeBatch:
    """The number of a batch -> `rows` of its `batch_size` rows, from `first_row` on.

    Raises:
      UsageError: `repeats` does not divide `rows`.
    """

    load: Callable[[int, np.random.Generator], Example]
    transforms: Sequence[Transform]
    num_examples: int
    seed: int
    batch_size: int
    first_row: int
    rows: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.rows % self.repeats:
            raise UsageError(
                f"data.repeats={self.repeats} must divide the {self.rows} images of a batch that a process reads"
            )

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Loads a record for each group of repeats and applies the transforms, in order, for each row."""
        order, generators = RecordOrder(self.num_examples, self.seed), Generators(self.seed)
        first_group = (number * self.batch_size + self.first_row) // self.repeats
        batch: dict[str, np.ndarray] = {}
        for row in range(0, self.rows, self.repeats):
            group = first_group + row // self.repeats
            rng = generators.at(group)
            loaded = self.load(order[group], rng)
            for repeat in range(self.repeats):
                example = loaded
                for transform in self.transforms:
                    example = transform(example, rng)
                put(example, batch, row + repeat, self.rows)
                loaded = loaded | {"faults": NO_FAULTS}  # they are told once
        return batch


def put(example: Example, batch: dict[str, np.ndarray], row: int, rows: int) -> None:
    """Copies an example into its row of a batch; the first one makes the arrays."""
    if not batch:
        batch.update({key: np.empty((rows, *value.shape), value.dtype) for key, value in example.items()})
    for key, array in batch.items():
        value = example[key]
        if value.shape != array.shape[1:]:  # which NumPy would broadcast
            raise ValueError(f"{key} of row {row} has shape {value.shape}, that of others {array.shape[1:]}")
        if key == "image":
            copy_pixels(value, array[row])
        else:
            array[row] = value
