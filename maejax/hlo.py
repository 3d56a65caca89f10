"""What a compiled program will do, read from its text: bytes that it sends, and cycles that the compiler expects.

XLA writes for every operation of a TPU program how many cycles it should take (`estimated_cycles`), once for the body
of a loop. Here both are multiplied by how often each computation runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes that a device must send over bytes of the result, for a group of n devices; rings reach these.
COLLECTIVES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,  # its result is an n-th of what is reduced
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
    kind: a name in COLLECTIVES.
    dtype: of the first array that it gives.
    bytes: that a device sends each time.
    group: how many devices take part.
    times: how often it runs.
    """

    kind: str
    dtype: str
    bytes: float
    group: int
    times: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program."""

    name: str
    shape: str
    op: str
    line: str


class Module:
    """A compiled program by its text, as `compiled.as_text()` gives it."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        self._num_devices = math.prod(
            int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        )
        current: list[Instruction] = []
        # Of a kernel's line, its metadata stands on lines of its own.
        text = re.sub(r"kernel_metadata=\{[^}]*\}", lambda found: found[0].replace("\n", ""), text)
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self._computations[head[2]] = []
                self._entry = head[2] if head[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(name=found[1], shape=found[2], op=found[3], line=line))
        self._times = self._count()

    def cycles(self) -> int:
        """Cycles that the compiler expects a device's core to compute, loops included; collectives have none."""
        return sum(
            int(found[1]) * times
            for instruction, times, fused in self._instructions()
            if not fused and (found := _CYCLES.search(instruction.line))
        )

    def kernels(self) -> list[dict[str, int]]:
        """The numbers in the metadata of every kernel, what it costs by its own count, times how often it runs.

        Raises:
          ValueError: a kernel does not say what it costs, so the program's cycles are not known.
        """
        found = []
        for instruction, times, _ in self._instructions():
            if instruction.op != "custom-call" or "tpu_custom_call" not in instruction.line:
                continue
            metadata = re.search(r"kernel_metadata=\{([^}]*)\}", instruction.line)
            numbers = re.findall(r'"(\w+)":\s*"(\d+)"', metadata[1]) if metadata else []
            if not numbers:
                raise ValueError(f"the kernel {instruction.name} does not say what it costs")
            found.append({name: int(number) * times for name, number in numbers})
        return found

    def collectives(self) -> list[Collective]:
        """Every collective operation, once: one that is spread over several fused operations has the same channel in
        all of them, and runs as often as the rarest. Blocks that are not looped over share channels, too, but each of
        their reductions is an operation of its own.
        """
        found: dict[str, Collective] = {}
        for (computation, fused), times in self._times.items():
            root = self._computations[computation][-1]
            for instruction in self._computations[computation]:
                kind = instruction.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                shape, started, spread = instruction.shape, instruction.op != kind, fused
                if kind == "all-reduce" and fused and root.op == "dynamic-slice":  # TPU's way to write a reduce-scatter
                    kind, shape, spread = "reduce-scatter", root.shape, False
                group = group_size(instruction.line, self._num_devices)
                size, dtype = shape_bytes(shape, started=started)
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                key = channel[1] if channel and spread else f"{computation}/{instruction.name}"
                times_seen = min(times, found[key].times) if key in found else times
                found[key] = Collective(kind, dtype, size * COLLECTIVES[kind](group), group, times_seen)
        return list(found.values())

    def _instructions(self) -> Iterator[tuple[Instruction, int, bool]]:
        for (name, fused), times in self._times.items():
            for instruction in self._computations[name]:
                yield instruction, times, fused

    def _count(self) -> dict[tuple[str, bool], int]:
        """How often each computation runs, by its name and whether it is part of a fused operation."""
        times: collections.Counter[tuple[str, bool]] = collections.Counter()

        def visit(name: str, number: int, fused: bool) -> None:
            times[name, fused] += number
            for instruction in self._computations[name]:
                line, inside = instruction.line, fused or instruction.op in ("fusion", "all-reduce", "reduce-scatter")
                if instruction.op == "while":
                    body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
                    assert body and condition, line
                    visit(body[1], number * self._trips(condition[1], line), fused)
                    continue
                called = _CALLS.findall(line)
                for branches in _BRANCHES.findall(line):
                    called += [branch.strip(" %") for branch in branches.split(",")]
                for callee in called:
                    if callee in self._computations:
                        visit(callee, number, inside)

        visit(self._entry, 1, False)
        return times

    def _trips(self, condition: str, line: str) -> int:
        """How often a loop runs: as its line says, or by the constant that its counter is compared to."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        constants = {
            instruction.name: int(number[1])
            for instruction in self._computations[condition]
            if (number := re.search(r" constant\((\d+)\)", instruction.line))
        }
        for instruction in self._computations[condition]:
            if instruction.op == "compare" and "direction=LT" in instruction.line:
                for name in re.findall(r"%?([\w.\-]+)[,)]", instruction.line.partition(" compare(")[2]):
                    if name in constants:
                        return constants[name]
        raise ValueError(f"the loop over {condition} does not say how often it runs")


def shape_bytes(shape: str, *, started: bool = False) -> tuple[int, str]:
    """Bytes of a shape as HLO writes it, a tuple's in sum, and the dtype of its (first) array.

    Args:
      started: the shape is that of a `-start`: a tuple of operands, results, and maybe more; only results count.
    """
    if started and shape.startswith("(("):  # several operands: ((operands), (results))
        shape = shape[2:].partition("), (")[2]
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    if started and len(arrays) > 1 and not shape.startswith("(("):
        arrays = arrays[1:2] if shape.startswith("(") else arrays
    bits = sum(BITS[dtype] * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in arrays)
    return bits // 8, arrays[0][0]


def group_size(line: str, num_devices: int) -> int:
    """How many devices a collective's line makes talk to each other."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return num_devices
