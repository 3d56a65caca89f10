"""Examples to batches, with one or several examples of each decoded image: `data.repeats` (mae_st's repeated sampling).

With k repeats, places g * k to g * k + k - 1 of the stream are crops, flips and masks of the one record of group g,
drawn one after the other from the group's generator: a pure function of seed and place, as without repeats.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from maejax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat(grain.transforms.RandomMap):
    """A loaded example -> `times` examples of it, each by `transforms`; its faults are told once."""

    transforms: tuple[grain.transforms.RandomMap, ...]
    times: int

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
        """Draws for one example after the other."""
        examples = []
        for _ in range(self.times):
            example = element
            for transform in self.transforms:
                example = transform.random_map(example, rng)
            examples.append(example)
            element = element | {"faults": np.full_like(element["faults"], -1)}
        return examples


def make_batches(examples: Any, transforms: Sequence[grain.transforms.RandomMap], *, rows: int, repeats: int) -> Any:
    """A dataset of loaded examples -> one of batches of `rows`, `repeats` of them of each example."""
    if repeats == 1:
        for transform in transforms:
            examples = examples.random_map(transform)
        return examples.batch(rows) if rows > 1 else examples.map(_alone)
    if rows % repeats:
        raise UsageError(f"data.repeats={repeats} must divide the {rows} images of a batch that a process reads")
    groups = examples.random_map(Repeat(transforms=tuple(transforms), times=repeats))
    return groups.batch(rows // repeats, batch_fn=_stack) if rows > repeats else groups.map(_stack_one)


# Grain counts an endless stream in batches of one beyond what Python can count; hence these two.


def _alone(example: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.asarray(value)[None] for key, value in example.items()}


def _stack_one(group: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return _stack([group])


def _stack(groups: Sequence[list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    """The examples of all groups, in order, as one batch."""
    examples = list(itertools.chain.from_iterable(groups))
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
