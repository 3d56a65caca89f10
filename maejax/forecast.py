"""What a run will need on hardware that is not there: memory, traffic and time, from the compiled step itself.

TPUs are compiled for with libtpu, and times are *predicted*: by the compiler's own cycle estimates, which no one has
measured here. GPUs cannot be compiled for without one: theirs is arithmetic, *analytic, not compiled*.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from maejax import build
from maejax.chips import CHIPS, Chip
from maejax.errors import UsageError
from maejax.hlo import COLLECTIVES, Module
from maejax.mesh import AXES, batch_shards, fill_axes, make_mesh
from maejax.program import Program, make_program
from maejax.sharding import PRESETS, spec_for
from maejax.targets import Target, tpu_devices
from maejax.tree import PyTree, count, named_leaves

PROGRAM_CYCLES = 500  # of a kernel's program, beside its work: waiting for its first operands, a third of a microsecond
GPU_MFU = 0.40  # assumed: the best published training of ViTs on GPUs reaches 0.29 to 0.45
# Bytes that a GPU keeps for the backward pass, by `model.remat`, for each token, layer and unit of width: the bfloat16
# inputs of the four products (1, 1, 1, 4), of norms (1, 1) and GELU (4), and q, k and v (3); with "dots" what products
# give (3, 1, 4, 1) and the block's input; with "full" that alone. Scores are computed again.
KEPT = {"none": 2 * 16, "dots": 2 * 10, "full": 2 * 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """Attributes, bytes being those of one device:
    how: "predicted", "analytic, not compiled", or that times are a bound because no cycles could be read.
    memory: bytes by what takes them; "total" is their sum.
    largest_batch: rows of the whole batch that fit by a linear model of the temporaries; 0: not even one a device.
    traffic: bytes sent in a step, by kind of collective; None where nothing was compiled.
    least_traffic: what the preset must send; None with `tensor`, whose activations move too.
    flops: of the matrix products that one device computes in a step, as traced (what is computed twice counts twice).
    least_flops: by the analytic formula of the objective.
    cycles: that the compiler expects, without collectives, and those of kernels; None where nothing was compiled.
    kernel_cycles: those of kernels among them, for which the compiler has no estimate: counted by `kernel_cycles`.
    compute, communication: seconds of a step.
    """

    target: Target
    how: str
    mesh: dict[str, int]
    batch_size: int
    total_steps: int
    num_parameters: int
    memory: dict[str, float]
    largest_batch: int
    optimizer_share: float  # optimizer's bytes of all devices over those of one copy; 1 if nothing is stored twice
    traffic: dict[str, float] | None
    least_traffic: float | None
    flops: float
    least_flops: float
    cycles: int | None
    kernel_cycles: int
    compute: float
    communication: float
    mean_work: float = 1.0  # FLOPs of a step over the whole run, whose images may grow, over those of the last one
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0

    @property
    def chip(self) -> Chip:
        """Of the target."""
        return CHIPS[self.target.chip]

    @property
    def fits(self) -> bool:
        """Whether everything fits into a device's memory."""
        return self.memory["total"] <= self.chip.memory

    @property
    def step_time(self) -> float:
        """Seconds, if communication hides behind nothing; `compute` is the least, if all of it hides."""
        return self.compute + self.communication

    @property
    def mfu(self) -> float:
        """Analytic FLOPs over the chip's peak, in `step_time`."""
        return self.least_flops / self.chip.peak / self.step_time

    @property
    def hours(self) -> float:
        """Of the whole run, steps alone; smaller images take as much less as they have fewer FLOPs."""
        return self.total_steps * self.step_time * self.mean_work / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {name: getattr(self, name) for name in ("fits", "step_time", "mfu", "hours")}
        plain = dataclasses.asdict(self) | {"target": self.target._asdict(), "chip": self.chip._asdict()}
        return plain | derived | {"device_hours": self.hours * self.target.num_devices}


def forecast(c: ConfigDict, target: Target, num_examples: int) -> Forecast:
    """What a run needs on `target`; compiles for TPUs, which takes minutes.

    Raises:
      UsageError: the mesh, the batch or the network cannot be split over the target's devices; libtpu is missing.
    """
    if build.classifies(c) and c.finetune.num_classes is None:
        raise UsageError("a plan needs the number of classes: --config.finetune.num_classes=1000")
    return _compiled(c, target, num_examples) if target.shape else _analytic(c, target, num_examples)


def _compiled(c: ConfigDict, target: Target, num_examples: int) -> Forecast:
    mesh = make_mesh(c.mesh, tpu_devices(target))
    p = make_program(c, mesh, num_examples=num_examples, num_classes=c.finetune.num_classes)
    chip, clocks = CHIPS[target.chip], (time.perf_counter(), time.process_time())
    memory = _state_memory(p)
    traffic, cycles, kernels = None, None, 0
    try:
        compiled = p.train_step.lower(p.shapes, p.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        memory["activations and temporaries"] = out_of_memory(str(error), memory)
    else:
        sizes = compiled.memory_analysis()
        memory["activations and temporaries"] = sizes.temp_size_in_bytes
        stated = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        memory["padding and code"] = (
            max(stated - sum(list(memory.values())[:-1]), 0) + sizes.generated_code_size_in_bytes
        )
        traffic, cycles, kernels = _read(compiled, chip)
    seconds, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    facts = _facts(c, p, mesh, target, memory)
    sent, least = sum((traffic or {}).values()), facts["least_traffic"] or 0.0
    if sent < 0.99 * least:  # of several that look alike, some were not told apart
        traffic, sent = None, least
    compute = cycles / chip.clock if cycles else facts["least_flops"] / chip.peak
    how = "predicted" if cycles else "a bound, at the chip's peak"
    return Forecast(
        how=how, **facts, traffic=traffic, cycles=cycles, kernel_cycles=kernels, compute=compute,
        communication=sent / chip.links, compile_seconds=seconds, compile_cpu_seconds=cpu,
    )  # fmt: skip


def _read(compiled: Any, chip: Chip) -> tuple[dict[str, float] | None, int | None, int]:
    """Traffic by kind, cycles and those of kernels in a compiled step; None for what its text does not say."""
    try:
        module = Module(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # libtpu writes some asynchronous operations in a way that jaxlib does not read
        return None, None, 0
    traffic = dict.fromkeys(COLLECTIVES, 0.0)
    for collective in module.collectives():
        traffic[collective.kind] += collective.bytes * collective.times
    try:
        kernels = sum(kernel_cycles(counts, chip) for counts in module.kernels())
    except ValueError:  # somebody else's kernel
        return traffic, None, 0
    return traffic, module.cycles() + kernels, kernels


def kernel_cycles(counts: Mapping[str, int], chip: Chip) -> int:
    """Cycles of a kernel by its own counts: of its programs, one after the other, or of its bytes if they are more.

    Not their sum: the operands of the next program come, and the results of the last one go, while one computes.
    """
    units = chip.peak / chip.clock / (2 * 128 * 128)
    programs = counts["matrix_cycles"] / units + PROGRAM_CYCLES * counts["programs"]
    return round(max(programs, counts["bytes"] / chip.bandwidth * chip.clock))


def _analytic(c: ConfigDict, target: Target, num_examples: int) -> Forecast:
    """GPUs are stood in for by as many devices without substance: shapes and shardings need no more."""
    axes = tuple(fill_axes(c.mesh, target.num_devices).values())
    mesh: Any = AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    p = make_program(c, mesh, num_examples=num_examples, num_classes=c.finetune.num_classes)
    chip, memory = CHIPS[target.chip], _state_memory(p)
    kept = kept_activations(c, c.batch_size // batch_shards(mesh) // c.grad_accum_steps)
    memory["activations and temporaries"] = kept + 2 * count(p.shapes.params)  # the working copy, or gradients
    facts = _facts(c, p, mesh, target, memory)
    compute = facts["least_flops"] / chip.peak / GPU_MFU
    return Forecast(
        how="analytic, not compiled", **facts, traffic=None, cycles=None, kernel_cycles=0, compute=compute,
        communication=(facts["least_traffic"] or 0.0) / chip.links,
    )  # fmt: skip


def _facts(c: ConfigDict, p: Program, mesh: Mesh, target: Target, memory: dict[str, float]) -> dict[str, Any]:
    """What both kinds of forecast have."""
    shards = batch_shards(mesh)
    fixed = sum(memory.values()) - memory["batch"] - memory["activations and temporaries"]
    a_row = (memory["batch"] + memory["activations and temporaries"]) / (c.batch_size / shards)
    rows = int(max(CHIPS[target.chip].memory - fixed, 0) / a_row) // c.grad_accum_steps * c.grad_accum_steps
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(p.shapes.opt_state))
    devices = target.num_devices // mesh.shape["tensor"]
    return {
        "target": target, "mesh": dict(mesh.shape), "batch_size": c.batch_size, "total_steps": p.total_steps,
        "num_parameters": count(p.shapes.params), "memory": memory | {"total": sum(memory.values())},
        "largest_batch": rows * shards, "optimizer_share": memory["optimizer"] * devices / max(whole, 1),
        "least_traffic": least_traffic(c, p, mesh), "flops": traced_flops(p) / target.num_devices,
        "least_flops": build.flops_per_image(c) * c.batch_size / target.num_devices,
        "mean_work": build.mean_flops_per_image(c) / build.flops_per_image(c),
    }  # fmt: skip


# ---- Memory ---------------------------------------------------------------------------------------------------------


def _state_memory(p: Program) -> dict[str, float]:
    parts = {"parameters": p.shapes.params, "optimizer": p.shapes.opt_state, "average": p.shapes.ema, "batch": p.batch}
    return {name: float(bytes_a_device(tree)) for name, tree in parts.items()}


def bytes_a_device(tree: PyTree) -> int:
    """Of the shapes in a tree, by their shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def out_of_memory(message: str, memory: dict[str, float]) -> float:
    """Bytes of temporaries, from the compiler's message that they do not fit.

    Raises:
      UsageError: it says something else.
    """
    wanted = re.search(r"(?:memory required for HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
    if not wanted:
        raise UsageError(f"the step does not compile: {message.splitlines()[0]}")
    needed = float(wanted[1]) * 1024.0 ** ("KMGT".index(wanted[2]) + 1)
    return needed if "temporaries" in message else needed - sum(memory.values())


def kept_activations(c: ConfigDict, rows: int) -> float:
    """Bytes of the activations that `rows` images keep for the backward pass, by `KEPT`."""
    s, (width, depth, _), kept = build.shapes_of(c), build.encoder_size(c), KEPT[c.model.remat]
    kept = kept * jnp.dtype(c.dtype).itemsize // 2
    if build.classifies(c):
        return float(rows * kept * (s.patches + 1) * width * depth)
    encoded = (s.patches if c.model.mask_tokens else s.visible) + int(c.model.cls_token)
    inner = c.decoder.width * c.decoder.depth
    if c.decoder.kind == "cross":  # keys and values are of the encoder's tokens, mixed for every block
        decoded = s.decoded * inner + encoded * (inner + width * c.decoder.depth) // 8
    else:
        decoded = (s.visible + s.decoded + int(c.model.cls_token)) * inner
    return float(rows * kept * (encoded * width * depth + decoded))


# ---- Traffic and work -----------------------------------------------------------------------------------------------


def least_traffic(c: ConfigDict, p: Program, mesh: Mesh) -> float | None:
    """Bytes that a device must send in a step: each gradient summed once and, where the preset splits, copies made.

    With b bytes for a number in the dtype of the products and P parameters: an all-reduce moves 2bP; zero1's
    reduce-scatter and gather as much; fsdp gathers twice: 3bP. What is not split, biases and norms, is all-reduced.
    """
    if mesh.shape["tensor"] > 1:
        return None
    preset, size = PRESETS[c.sharding], jnp.dtype(c.dtype).itemsize
    n = batch_shards(mesh)
    total = 0.0
    for path, leaf in named_leaves(p.shapes.params).items():
        split = spec_for(path, leaf.shape, preset.state, mesh)
        again = preset.layer is not None and spec_for(path, leaf.shape, preset.work, mesh) == split
        total += size * leaf.size * (3 if again and any(split) else 2) * (n - 1) / n
    return total


def traced_flops(p: Program) -> float:
    """Of all matrix products in the step as it is traced, all devices together; loops count as often as they run.

    XLA's own `cost_analysis` counts the body of a loop once.
    """
    return _flops(p.train_step.trace(p.shapes, p.batch).jaxpr)


# How often what is inside of an operation runs, on all devices together.
_TIMES: dict[str, Callable[[Any], int]] = {
    "scan": lambda params: params["length"],
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
    "shard_map": lambda params: params["mesh"].size,
}


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        times = _TIMES.get(equation.primitive.name, lambda _: 1)(equation.params)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += times * _flops(getattr(inner, "jaxpr", inner))
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
