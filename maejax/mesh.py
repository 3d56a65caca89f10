"""Devices as a named mesh `dcn_data x data x fsdp x tensor`, and host batches as global arrays on it.

`dcn_data` runs over slices of a TPU, or over nodes: what lies along it is connected by the data-center network only, so
parameters and moments are never split over it (hybrid sharding). The other axes lie inside a slice or node.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maejax.errors import UsageError

AXES = ("dcn_data", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn_data", "data", "fsdp")  # rows of a batch are split over them


def fill_axes(sizes: Mapping[str, int | None], num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """`sizes` of the axes with a single -1 replaced, so that their product is the number of devices.

    An unset `dcn_data` is the number of slices.
    """
    given = {axis: num_slices if sizes[axis] is None else int(sizes[axis] or 0) for axis in AXES}
    known = math.prod(size for size in given.values() if size != -1)
    filled = {axis: num_devices // known if known > 0 and size == -1 else size for axis, size in given.items()}
    if math.prod(filled.values()) != num_devices or min(filled.values()) < 1:
        asked = " x ".join(f"{axis}={size}" for axis, size in given.items() if axis != "dcn_data" or size != 1)
        raise UsageError(
            f"mesh {asked} does not make {num_devices} device{'s' * (num_devices != 1)}; "
            "the product must be that number, and one axis may be -1 (what is left)"
        )
    return filled


def make_mesh(sizes: Mapping[str, int | None], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given); `sizes` as in the config.

    Devices are taken slice by slice, process by process. So each process holds contiguous rows of every batch, on any
    topology, and the inner axes lie within a host or its neighbors.
    """
    devices = jax.devices() if devices is None else devices
    place = {device: (getattr(device, "slice_index", None) or 0, device.process_index, device.id) for device in devices}
    filled = fill_axes(sizes, len(devices), len({slice_index for slice_index, _, _ in place.values()}))
    array = np.array(sorted(devices, key=lambda device: place[device])).reshape(tuple(filled.values()))
    # Classic axes: shardings of intermediate values are the compiler's business.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """(i, p): the process holds the i-th of p equal, contiguous parts of every batch.

    Processes that share their rows (`tensor` over several of them) hold the same part.
    """
    shards = mesh.devices.reshape(batch_shards(mesh), -1)
    mine = [row for row, devices in enumerate(shards) if any(d.process_index == process for d in devices)]
    if not mine or len(shards) % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise UsageError(
            f"process {process} would hold batch shards {mine} of {len(shards)}, and they must be an equal, contiguous "
            "part; give every process the same number of devices"
        )
    return mine[0] // len(mine), len(shards) // len(mine)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def whole(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_topology(
    sizes: Mapping[str, int | None], batch_size: int, grad_accum_steps: int, *, processes: int, devices: int | None
) -> None:
    """Raises UsageError if a batch cannot be split over so many processes with so many devices each (None: not known).

    Before any device is touched, so it cannot know slices; `check_batch` has the last word.
    """
    rows = batch_size // grad_accum_steps
    if devices is None:  # each process has one or more
        parts, possible = processes, max(sizes["tensor"] or 1, 1) * rows % processes == 0
    else:
        filled = fill_axes(sizes, processes * devices)
        parts = math.prod(filled[axis] for axis in BATCH_AXES)
        possible = rows % parts == 0
    if not possible:
        where = f"{processes} process{'es' * (processes > 1)}"
        where += f" x {devices} device{'s' * (devices > 1)}" if devices else ""
        accumulated = f" in {grad_accum_steps} accumulation steps" if grad_accum_steps > 1 else ""
        raise UsageError(
            f"batch_size={batch_size}{accumulated} cannot be split over {where} into {parts} equal parts; "
            f"{legal_parts(rows, parts)} would do"
        )


def legal_parts(rows: int, near: int) -> str:
    """The numbers of equal parts that rows can be split into, for people; the dozen nearest to `near`."""
    divisors = [part for part in range(1, rows + 1) if rows % part == 0]
    nearest = sorted(sorted(divisors, key=lambda part: abs(math.log(part / near)))[:12])
    return ", ".join(str(part) for part in nearest)


def check_batch(batch_size: int, mesh: Mesh, grad_accum_steps: int = 1) -> None:
    """Raises UsageError unless every device gets the same number of rows of every microbatch."""
    shards = batch_shards(mesh)
    if batch_size % (shards * grad_accum_steps):
        rows = shards * grad_accum_steps
        lower, upper = batch_size // rows * rows, (batch_size // rows + 1) * rows
        axes = " x ".join(axis for axis in BATCH_AXES if axis != "dcn_data" or mesh.shape[axis] > 1)
        raise UsageError(
            f"batch_size={batch_size} is not divisible by {rows} = {shards} batch shards ({axes}) x "
            f"{grad_accum_steps} accumulation steps; use {f'{lower} or ' if lower else ''}{upper}, or "
            f"{legal_parts(batch_size // grad_accum_steps, shards)} shards"
        )


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch -> global arrays. The transfer is asynchronous."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()}
