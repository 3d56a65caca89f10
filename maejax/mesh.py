"""Devices as a named mesh `data x fsdp x tensor`, and host batches as global arrays on it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maejax.errors import UsageError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both


def fill_axes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """`sizes` of the three axes with a single -1 replaced, so that their product is the number of devices."""
    asked = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: num_devices // known if sizes[axis] == -1 else sizes[axis] for axis in AXES}
    if math.prod(filled.values()) != num_devices:
        raise UsageError(
            f"mesh {asked} does not make {num_devices} device{'s' * (num_devices != 1)}; "
            "the product must be that number, and one axis may be -1 (what is left)"
        )
    return filled


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh over all devices; `sizes` as in the config."""
    filled = fill_axes(sizes, jax.device_count())
    # Classic axes: shardings of intermediate values are the compiler's business.
    return jax.make_mesh(tuple(filled.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh, grad_accum_steps: int = 1) -> None:
    """Raises UsageError unless every device gets the same number of rows of every microbatch."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (shards * grad_accum_steps):
        rows = shards * grad_accum_steps
        lower, upper = batch_size // rows * rows, (batch_size // rows + 1) * rows
        raise UsageError(
            f"batch_size={batch_size} is not divisible by {rows} = {shards} batch shards (data x fsdp) x "
            f"{grad_accum_steps} accumulation steps; use {f'{lower} or ' if lower else ''}{upper}"
        )


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch -> global arrays. The transfer is asynchronous."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, rows) for key, rows in batch.items()}
