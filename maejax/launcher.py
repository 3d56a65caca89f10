"""Files that start a run elsewhere, rendered from the templates in `launch/`; no cloud's library is needed.

A template is the file itself with `@{name}` where a value goes. A line that names a value which was not given is left
out.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from maejax.errors import UsageError, look_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A place to run."""

    template: str
    submit: tuple[str, ...]  # the program that takes the file, with its arguments
    uses: tuple[str, ...] = ()  # options that it understands beside name, restarts, out and submit
    needs: tuple[str, ...] = ()  # those of them that must be given
    calls: tuple[str, ...] = ()  # programs that the file itself calls when it is submitted
    here: bool = True  # it sees this machine's files


TARGETS = {
    "slurm": Target(
        template="slurm.sbatch",
        submit=("sbatch",),
        uses=("nodes", "tasks_per_node", "gpus", "time", "partition", "account"),
    ),
    "tpu-vm": Target(
        template="tpu-vm.sh",
        submit=("bash",),
        uses=("accelerator", "zone", "project", "storage", "install"),
        needs=("accelerator", "zone", "storage"),
        calls=("gcloud",),
        here=False,
    ),
    "jobset": Target(
        template="jobset.yaml",
        submit=("kubectl", "apply", "-f"),
        uses=("nodes", "gpus", "accelerator", "image", "storage"),
        needs=("image", "storage"),
        here=False,
    ),
    "skypilot": Target(
        template="skypilot.yaml",
        submit=("sky", "jobs", "launch", "--yes"),
        uses=("nodes", "accelerator", "image", "storage", "install"),
        needs=("accelerator", "storage"),
        here=False,
    ),
    "local": Target(template="local.sh", submit=("bash",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """What a generation of TPUs is called."""

    gcloud: str  # its accelerator types begin with this
    runtime: str  # the version of its virtual machines
    gke: str  # label of its nodes


TPUS = {
    "v5e": Tpu(gcloud="v5litepod", runtime="v2-alpha-tpuv5-lite", gke="tpu-v5-lite-podslice"),
    "v6e": Tpu(gcloud="v6e", runtime="v2-alpha-tpuv6e", gke="tpu-v6e-slice"),
}
# Chips of a slice, and how they are arranged. Up to 8 share a host; in larger slices each host has 4.
TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def templates_folder() -> Path:
    """Where the templates are: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "launch"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "launch"


def render(template: str, values: Mapping[str, str | int | None]) -> str:
    """The template of that file name with its values."""
    lines = []
    for line in (templates_folder() / template).read_text().splitlines(keepends=True):
        names = re.findall(r"@\{(\w+)\}", line)
        if all(values[name] is not None for name in names):
            lines.append(re.sub(r"@\{(\w+)\}", lambda place: str(values[place[1]]), line))
    return "".join(lines)


def tpu_values(accelerator: str) -> dict[str, str | int]:
    """What each target calls the slice that is named `v5e-32`: generation, and number of chips."""
    generation, _, number = accelerator.partition("-")
    tpu = look_up(TPUS, generation, "--accelerator")
    if not number.isdigit() or int(number) not in TOPOLOGIES:
        raise UsageError(
            f"--accelerator={accelerator}: a {generation} slice has {', '.join(map(str, TOPOLOGIES))} chips, "
            f"as in {generation}-32"
        )
    chips = int(number)
    return {
        "tpu_type": f"{tpu.gcloud}-{chips}",
        "tpu_runtime": tpu.runtime,
        "tpu_gke": tpu.gke,
        "tpu_topology": TOPOLOGIES[chips],
        "tpu_chips": chips if chips <= 8 else 4,  # of one host
        "nodes": 1 if chips <= 8 else chips // 4,
    }
