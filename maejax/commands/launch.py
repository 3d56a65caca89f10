"""Start a run with Slurm, on TPU VMs, with JobSet or SkyPilot, or here under a script that starts it again.

examples:
  maejax launch --on=slurm --nodes=4 --gpus=8 --time=2-00:00:00 pretrain --config=my_recipe.py --workdir=runs/b16
  maejax launch --on=tpu-vm --accelerator=v5e-32 --zone=us-west4-a --storage=10.0.0.2:/runs \\
      pretrain --config=pretrain_vit_b16_imagenet --workdir=/mnt/runs/b16
  maejax launch --on=jobset --nodes=4 --gpus=8 --image=IMAGE --storage=CLAIM pretrain --config=... --workdir=...
  maejax launch --on=skypilot --nodes=2 --accelerator=H100:8 --storage=s3://BUCKET finetune --config=... --workdir=...
  maejax launch --on=local --submit pretrain ~/photos --workdir=runs/photos

Checks the command, writes a commented file for you to read and change, and prints the command that submits it; --submit
runs that command. Exit code 75 (interrupted and saved) and 124 (stalled) start the run again, at most --restarts times.
--on=slurm and local write into WORKDIR/launch/, where the logs will be, too; the others write into the current folder.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maejax import __version__
from maejax.commands.arguments import Parser
from maejax.errors import UsageError, look_up
from maejax.launcher import TARGETS, TPUS, Target, render, tpu_values
from maejax.workdir import LAUNCH, check_workdir

VERBS = ("pretrain", "finetune")  # those that train
TIME = re.compile(r"\d+|\d+(:\d\d){1,2}|\d+-\d+(:\d\d){0,2}")
WORD = re.compile(r"[\w.,:/@+=-]+")  # needs no quotes, neither in bash nor in YAML


def run(arguments: Sequence[str]) -> None:
    """maejax launch."""
    options = _parse(arguments)
    target = look_up(TARGETS, options.on, "--on")
    _check_options(options, target)
    machines = _machines(options)
    verb, *rest = options.command
    workdir = _check_command(verb, rest, here=target.here, several=machines["hosts"] * machines["tasks_per_node"] > 1)
    name = _name(options.name, workdir)
    file = options.out or (workdir / LAUNCH / target.template if target.here else Path(f"{name}.{target.template}"))
    submit = [*target.submit, str(file)]
    if not WORD.fullmatch(str(file)):
        raise UsageError(f"--out={file} may hold letters, digits and .,:/@+=-")
    if options.submit:
        for program in (submit[0], *target.calls):
            if shutil.which(program) is None:
                raise UsageError(f"--submit needs {program}, which is not installed here; leave --submit out")
    if not any(argument.partition("=")[0] in ("--workdir", "--out") for argument in rest):
        rest.append(f"--workdir={workdir}")
    python = sys.executable if target.here else "python3"
    values = {
        "title": f"maejax {verb}, made by `maejax launch --on={options.on}`; change what your machines want otherwise.",
        "name": name,
        "submit": shlex.join(submit),
        "command": shlex.join([python, "-m", "maejax", verb, *rest]),
        "logs": str(workdir / LAUNCH),
        "mount": str(workdir.parent),
        "restarts": options.restarts,
    }
    _write(file, render(target.template, machines | values), workdir if target.here else None)
    print(f"wrote   {file}")
    if not target.here and (note := _note_on_recipe(rest)):
        print(note)
    print(f"submit  {shlex.join(submit)}", flush=True)
    if options.submit:
        os.execvp(submit[0], submit)  # its exit code is ours


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("launch", __doc__)
    parser.add_argument("--on", metavar="TARGET", required=True, help=", ".join(TARGETS))
    parser.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--tasks-per-node", type=int, metavar="N", help="processes of one (default: 1, for all devices)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="of one machine")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="limit of the job; at its end the run saves and goes on")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--account", help="that is charged")
    parser.add_argument("--accelerator", metavar="NAME", help="a TPU slice, v5e-32 or v6e-16; SkyPilot: H100:8, too")
    parser.add_argument("--zone", help="of the TPU VM")
    parser.add_argument("--project", help="of the cloud (default: gcloud's)")
    parser.add_argument("--image", help="container image that has maejax in it")
    parser.add_argument(
        "--storage",
        help="mounted at the folder above --workdir: tpu-vm HOST:/SHARE (NFS), jobset CLAIM, skypilot BUCKET",
    )
    parser.add_argument("--install", metavar="COMMAND", help="how a new machine gets maejax (default: with pip)")
    parser.add_argument("--restarts", type=int, default=100, metavar="N", help="limit (default: %(default)s)")
    parser.add_argument("--name", help="of the job (default: the workdir's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file that is written")
    parser.add_argument("--submit", action="store_true", help="submit it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=f"{' or '.join(VERBS)}, with its arguments")
    options = parser.parse_args(arguments)
    if not options.command:
        raise UsageError("say what to launch, after the options: maejax launch --on=TARGET pretrain --config=...")
    look_up(dict.fromkeys(VERBS), options.command[0], "the command to launch")
    return options


def _check_options(options: argparse.Namespace, target: Target) -> None:
    """Raises UsageError for options that the target does not know, lacks, or cannot use together."""
    special = {option for other in TARGETS.values() for option in other.uses}
    given = {option for option in special if getattr(options, option) is not None}
    flag = "--{}".format
    for option in sorted(given - set(target.uses)):
        users = [name for name, other in TARGETS.items() if option in other.uses]
        raise UsageError(f"{flag(option.replace('_', '-'))} is for {', '.join(users)}, not for --on={options.on}")
    for option in target.needs:
        if option not in given:
            raise UsageError(f"--on={options.on} needs {flag(option)}; see maejax launch --help")
    for option, least in (("nodes", 1), ("tasks_per_node", 1), ("gpus", 1), ("restarts", 0)):
        value = getattr(options, option)
        if value is not None and value < least:
            raise UsageError(f"{flag(option.replace('_', '-'))}={value} must be at least {least}")
    for option in ("time", "partition", "account", "accelerator", "zone", "project", "image", "storage"):
        value = getattr(options, option)
        if value is not None and not WORD.fullmatch(value):
            raise UsageError(f"{flag(option)}={value!r} may hold letters, digits and .,:/@+=-")
    if options.time is not None and not TIME.fullmatch(options.time):
        raise UsageError(f"--time={options.time} must be minutes, or [DAYS-]HOURS:MINUTES:SECONDS as in 1-12:00:00")
    if options.gpus is not None and (options.tasks_per_node or 1) not in (1, options.gpus):
        raise UsageError(
            f"--tasks-per-node={options.tasks_per_node} with --gpus={options.gpus}: a node has one process for all of "
            "its GPUs, or one for each"
        )
    if options.accelerator is not None and options.gpus is not None:
        raise UsageError("--accelerator and --gpus are two kinds of machine; keep one of them")
    for text in (*options.command, options.install or ""):
        if not text.isprintable():
            raise UsageError(f"{text!r} has a line break or another control character, which no launch file can hold")


def _check_command(verb: str, rest: list[str], *, here: bool, several: bool) -> Path:
    """Checks the command as the verb itself would before it looks at images; returns the run's folder."""
    module = importlib.import_module(f"maejax.commands.{verb}")
    command, file, assignments = module.parse(rest)
    for option in ("keys", "coordinator", "num_processes", "process_id", "fake_processes", "fake_devices"):
        if getattr(command, option) not in (None, False):
            raise UsageError(f"--{option.replace('_', '-')} is not for a launched run; give it to maejax {verb} itself")
    if several and file is None and verb == "pretrain":
        raise UsageError("several processes need --config=RECIPE: a run chosen for the machine that it is on suits one")
    workdir: Path = command.workdir
    if not WORD.fullmatch(str(workdir)):
        raise UsageError(f"--workdir={workdir} may hold letters, digits and .,:/@+=- where it is launched elsewhere")
    if here:
        check_workdir(workdir)
    elif not workdir.is_absolute() or len(workdir.parts) < 3:
        raise UsageError(
            f"--workdir={workdir} must be a folder of the storage that all machines share, from the root and below "
            "where it is mounted: for example /mnt/runs/b16"
        )
    config = module.config_before_data(command, file, assignments, here=here)
    if config is not None:
        from maejax import build
        from maejax.check import check

        check(config)
        build.check_names(config)
    return workdir


def _name(given: str | None, workdir: Path) -> str:
    """A name that every target accepts."""
    name = given or re.sub(r"[^a-z0-9]+", "-", workdir.name.lower()).strip("-")[:40].strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        if given:
            raise UsageError(f"--name={given} must be at most 40 small letters, digits and dashes, a letter first")
        name = f"maejax-{name}"[:40].strip("-")
    return name


def _machines(options: argparse.Namespace) -> dict[str, Any]:
    """Values that say which machines run it. None: not given, or not of this target."""
    values = {option: getattr(options, option) for target in TARGETS.values() for option in target.uses}
    values["nodes"] = options.nodes or 1
    values["tasks_per_node"] = options.tasks_per_node or 1
    values |= dict.fromkeys(("tpu_type", "tpu_runtime", "tpu_gke", "tpu_topology", "tpu_chips"))
    accelerator = options.accelerator or ""
    tpu = accelerator.partition("-")[0] in TPUS or options.on in ("tpu-vm", "jobset")
    if accelerator and tpu:
        if options.nodes is not None:
            raise UsageError(f"--nodes={options.nodes}: --accelerator={accelerator} says how many hosts there are")
        values |= tpu_values(accelerator)
    values["hosts"] = values["nodes"]
    if accelerator and tpu:
        if options.on == "skypilot":  # which counts a slice as one node
            values |= {"accelerator": f"tpu-{values['tpu_type']}", "nodes": 1}
    elif accelerator and not re.fullmatch(r"[A-Za-z][\w-]*:[1-9]\d*", accelerator):
        raise UsageError(f"--accelerator={accelerator} must be NAME:NUMBER, as in H100:8, or a TPU slice, as in v5e-32")
    # TPUs know of each other, a single process has nobody to meet.
    values["processes"] = None if (accelerator and tpu) or values["nodes"] == 1 else values["nodes"]
    extra = "tpu" if accelerator and tpu else "cuda13"
    values["install"] = options.install or f"python3 -m pip install 'maejax[{extra}]=={__version__}'"
    return values


def _write(file: Path, text: str, workdir: Path | None) -> None:
    """Writes the file, and makes the folder of logs in `workdir`; what somebody has changed is never overwritten."""
    try:
        if workdir is not None:
            (workdir / LAUNCH).mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text() != text:
            raise UsageError(f"{file} exists with other content; remove it, or write elsewhere with --out=FILE")
        file.write_text(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def _note_on_recipe(rest: list[str]) -> str | None:
    """Where a recipe must be that is not shipped with maejax."""
    from maejax import config as configs
    from maejax.commands.arguments import split_config_flags

    file = split_config_flags(rest)[0]
    if file is None or configs.find_recipe(file).resolve().parent == configs.recipes_folder().resolve():
        return None
    return f"note    {file} is a recipe of this machine: the others need it under the same name"
