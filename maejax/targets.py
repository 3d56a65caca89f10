"""Names of hardware to plan for: `v5e-32`, `v5p:4x4x8`, `gpu:h100x8`.

A TPU's name is the one that Google Cloud gives it, and its number counts what Google counts: chips for v5e and v6e;
cores, two a chip, for v4 and v5p. So v5p-128 has 64 chips.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from maejax.chips import CHIPS
from maejax.errors import UsageError

# The slices that Google Cloud offers, chips along each axis of the torus.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT}
CORES_COUNTED = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
GPUS_A_NODE = 8


class Target(NamedTuple):
    """Attributes:
    name: as it was asked for.
    chip: a name in CHIPS.
    num_devices: chips, or GPUs. One device is one chip everywhere.
    shape: of a TPU's torus; "" for GPUs.
    """

    name: str
    chip: str
    num_devices: int
    shape: str


def tpu_names() -> dict[str, tuple[str, str]]:
    """{name: (chip, shape)} of the TPU slices with a name."""
    return {
        f"{chip}-{chips_of(shape) * CORES_COUNTED[chip]}": (chip, shape)
        for chip, shapes in SHAPES.items()
        for shape in shapes
    }


def chips_of(shape: str) -> int:
    """Chips of a torus: "4x8" has 32."""
    return math.prod(int(side) for side in shape.split("x"))


def parse_targets(names: str) -> list[Target]:
    """The targets of `--on`, with commas between them."""
    return [_parse(name.strip()) for name in names.split(",")]


def _parse(name: str) -> Target:
    if gpu := re.fullmatch(r"gpu:([a-z0-9]+)x([1-9]\d*)", name):
        gpus = [chip for chip in CHIPS if chip not in SHAPES]
        if gpu[1] not in gpus:
            raise UsageError(f"--on={name}: {gpu[1]!r} is not one of {', '.join(gpus)}")
        return Target(name, gpu[1], int(gpu[2]), "")
    named = tpu_names()
    if name in named:
        chip, shape = named[name]
        return Target(name, chip, chips_of(shape), shape)
    chip, colon, shape = name.partition(":")
    if chip in SHAPES and colon and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return Target(name, chip, chips_of(shape), shape)
    if chip.partition("-")[0] in SHAPES:
        chip = chip.partition("-")[0]
        offered = ", ".join(known for known in named if known.startswith(f"{chip}-"))
        raise UsageError(f"--on={name}: there is {offered}, and {chip}:{SHAPES[chip][3]} for any other torus")
    raise UsageError(f"--on={name} is not known; there is {', '.join(named)}, and gpu:h100x8 for {GPUS_A_NODE} GPUs")


def tpu_devices(target: Target) -> list[Any]:
    """The devices of a TPU that is not there, to compile for; needs libtpu.

    Raises:
      UsageError: libtpu is not installed, or does not know the torus.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"--on={target.name} is compiled with libtpu, which is not installed: pip install 'maejax[tpu]'"
        )
    # Read when libtpu loads: ask no metadata server what machine this is, do not complain that it is none, and let
    # others plan at the same time.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)

    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # what is really there is none of our business
    # Programs for what is not there can be put into a cache and not be read from it: JAX warns, and compiles again.
    jax.config.update("jax_enable_compilation_cache", False)
    # Without its "megacore" a v4 chip is two devices; the others are one, however they are asked for.
    options = {"chip_config_name": "megacore"} if target.chip == "v4" else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.chip}:{target.shape}", **options
        )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(SHAPES[target.chip])
        reason = str(error).splitlines()[0]
        raise UsageError(f"--on={target.name}: {reason}; usual for {target.chip}: {known}") from error
    return list(topology.devices)
