"""One two-way table of names per format: which of their tensors is which of our parameters, and how it lies in memory.

A table is a list of `Rule`s. Exporting reads it from right to left, importing from left to right; nothing else knows
both sides. `lines` writes the rules out for a network's depth, one line for each of their tensors; `compare` refuses
whatever one side has and the other has not.

Our parameters go by flat names, "encoder/blocks/block/mlp/fc1/kernel", and those of blocks are stacked (l ...).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from maejax.errors import UsageError

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Patch:
    """Sides and channels of a patch: what is needed to tell the axes of a patch embedding apart."""

    p: int
    q: int
    c: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ours becomes theirs by a reshape to `split(shape, patch)` and a permutation of the axes (None: none)."""

    split: Callable[[Shape, Patch], Shape]
    order: tuple[int, ...] | None = None

    def shape(self, ours: Shape, patch: Patch) -> Shape:
        """Their shape for our shape."""
        split = self.split(ours, patch)
        return split if self.order is None else tuple(split[axis] for axis in self.order)

    def export(self, array: np.ndarray, patch: Patch) -> np.ndarray:
        """Our array as theirs."""
        split = array.reshape(self.split(array.shape, patch))
        return split if self.order is None else split.transpose(self.order)

    def restore(self, array: np.ndarray, ours: Shape) -> np.ndarray:
        """Their array as ours, which has shape `ours`."""
        back = array if self.order is None else array.transpose(np.argsort(self.order))
        return back.reshape(ours)


def _folded(shape: Shape, inputs: int) -> Shape:
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


SAME = Layout(lambda shape, _: shape)
FLAT = Layout(lambda shape, _: (math.prod(shape),))
# Matrices: torch's are (outputs, inputs). Attention's last one has two input axes in our tree, (heads, channels).
MATRIX = Layout(lambda shape, _: _folded(shape, 1), (1, 0))
MATRIX_OF_HEADS = Layout(lambda shape, _: _folded(shape, 2), (1, 0))
DENSE = Layout(lambda shape, _: _folded(shape, 1))
DENSE_OF_HEADS = Layout(lambda shape, _: _folded(shape, 2))
# Patch embeddings as convolutions: ours is (p*q*c d), torch's (d c p q), Flax's (p q c d).
CONVOLUTION = Layout(lambda shape, patch: (patch.p, patch.q, patch.c, shape[-1]), (3, 2, 0, 1))
FLAX_CONVOLUTION = Layout(lambda shape, patch: (patch.p, patch.q, patch.c, shape[-1]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """`theirs` is their name, with {i} for the number of a block; `ours` is our flat name."""

    theirs: str
    ours: str
    layout: Layout = SAME
    part: int | None = None  # of our fused queries, keys, values: which one theirs is


def blocks(theirs: str, ours: str, names: Iterable[tuple[str, str, Layout, int | None]]) -> list[Rule]:
    """The rules of a stack of blocks, from names inside one block."""
    return [Rule(f"{theirs}{name}", f"{ours}/blocks/block/{own}", layout, part) for name, own, layout, part in names]


@dataclasses.dataclass(frozen=True)
class Line:
    """One of their tensors, its shape, and which piece of our parameter it is."""

    theirs: str
    shape: Shape
    ours: str
    rule: Rule
    block: int | None

    def piece(self, array: np.ndarray) -> np.ndarray:
        """The piece of our parameter, as a view."""
        if self.block is not None:
            array = array[self.block]
        if self.rule.part is not None:  # kernels (d 3 heads channels), biases (3 heads channels)
            array = array[..., self.rule.part, :, :]
        return array

    def export(self, arrays: Mapping[str, np.ndarray], patch: Patch) -> np.ndarray:
        """Their tensor."""
        return self.rule.layout.export(self.piece(arrays[self.ours]), patch)

    def fill(self, arrays: Arrays, tensor: np.ndarray) -> None:
        """Puts their tensor where it belongs in our parameter."""
        place = self.piece(arrays[self.ours])
        place[...] = self.rule.layout.restore(tensor, place.shape)


def lines(table: Sequence[Rule], shapes: Mapping[str, Shape], patch: Patch) -> list[Line]:
    """The table written out for parameters of these shapes; raises UsageError for one that no rule names."""
    known = {rule.ours for rule in table}
    for name in shapes:
        if name not in known:
            raise UsageError(f"{name} has no counterpart in this format, so the network cannot be written in it")
    found = []
    for rule in table:
        if rule.ours not in shapes:
            continue
        inner, stacked = shapes[rule.ours], "{i}" in rule.theirs
        inner = inner[1:] if stacked else inner
        if rule.part is not None:
            inner = (*inner[:-3], *inner[-2:])
        shape = rule.layout.shape(inner, patch)
        for i in range(shapes[rule.ours][0]) if stacked else (None,):
            name = rule.theirs if i is None else rule.theirs.format(i=i)
            found.append(Line(name, shape, rule.ours, rule, i))
    return found


def compare(where: str, expected: Sequence[Line], there: Mapping[str, Shape]) -> None:
    """Raises UsageError for the first tensor that is missing, has another shape, or is left over."""
    for line in expected:
        if line.theirs not in there:
            raise UsageError(
                f"{where}: tensor {line.theirs} is missing ({len(there)} tensors, expected {len(expected)})"
            )
        if there[line.theirs] != line.shape:
            raise UsageError(f"{where}: tensor {line.theirs} has shape {there[line.theirs]}, expected {line.shape}")
    names = {line.theirs for line in expected}
    for name in there:
        if name not in names:
            raise UsageError(f"{where}: tensor {name} is left over: nothing in the network corresponds to it")


def stack_depth(where: str, table: Sequence[Rule], part: str, names: Iterable[str]) -> int:
    """How many blocks of a part there are; raises UsageError if their numbers have a gap."""
    heads = {rule.theirs.split("{i}")[0] for rule in table if rule.ours.startswith(f"{part}/") and "{i}" in rule.theirs}
    numbers: dict[int, str] = {}
    for name in names:
        for head in heads:
            digits = re.split(r"[./]", name.removeprefix(head))[0] if name.startswith(head) else ""
            if re.fullmatch(r"\d{1,9}", digits):
                numbers[int(digits)] = f"{head}{digits}"
    for i in range(len(numbers)):
        if i not in numbers:
            raise UsageError(f"{where}: block {i} of the {part} is missing, {numbers[max(numbers)]} is there")
    return len(numbers)
