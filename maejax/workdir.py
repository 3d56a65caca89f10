"""A run's directory: opened new or to resume, refused when it is somebody else's or when the config has changed.

config.json command.txt env.json train.log metrics.jsonl bad_images.jsonl unusable_records.jsonl tensorboard/
checkpoints/ pictures/ evals/
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from maejax import bounded
from maejax import config as configs
from maejax.errors import UsageError
from maejax.redact import masked_arguments

LOCK = ".lock"  # held by the process that runs here
LAUNCH = "launch"  # what `maejax launch` writes, before there is a run
PACKAGES = ("maejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "simplejpeg")


def stored_config(workdir: Path) -> ConfigDict | None:
    """The config that a run in `workdir` was started with; None if there is none."""
    file = workdir / "config.json"
    if not file.is_file():
        return None
    try:
        return configs.from_dict(bounded.read_json(file))
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is not readable JSON ({error}); restore it or choose another --workdir") from error


def check_workdir(workdir: Path) -> None:
    """Raises UsageError unless a run may live in `workdir`: new, empty, or a run's already, and writable."""
    try:
        workdir.exists()
    except OSError as error:  # a name too long, for one
        raise UsageError(f"--workdir={workdir} cannot be a folder: {error.strerror}") from error
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir} is a file; give a folder")
    there = {file.name for file in workdir.iterdir()} if workdir.is_dir() else set()
    if there - {LOCK, LAUNCH} and "config.json" not in there:
        raise UsageError(
            f"--workdir={workdir} is not empty and not a run of maejax (no config.json); choose another folder"
        )
    parent = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    try:  # to write is the only proof: permissions say little for root or on a read-only disk
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UsageError(f"--workdir={workdir}: {parent} is not a folder that can be written to") from error


def check_same_run(workdir: Path, config: ConfigDict) -> list[str]:
    """What a resumed run changes of its execution, a line each.

    Raises UsageError with the differences if it changes what is computed.
    """
    stored = stored_config(workdir)
    if stored is None:
        return []
    changed = configs.differences(stored, config)
    forbidden = [key for key in changed if not configs.only_execution(key)]
    if forbidden:
        listed = "; ".join(f"{key} was {changed[key][0]}, now {changed[key][1]}" for key in forbidden)
        raise UsageError(
            f"{workdir} was started with another config: {listed}. Choose another --workdir (to start from these "
            f"weights: --from={workdir}), or leave the config as it was"
        )
    return [f"{key} changed from {old} to {new}" for key, (old, new) in changed.items()]


def lock(workdir: Path) -> TextIO:
    """Holds the directory for this process for as long as the returned file is open; refuses a second run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"another run is writing to {workdir}; wait for it or choose another --workdir") from None
    return file


def record_start(workdir: Path, config: ConfigDict, devices: str) -> None:
    """Writes config.json, appends the command, and notes the environment."""
    draft = workdir / "config.json.draft"
    draft.write_text(json.dumps(configs.to_dict(config), indent=2) + "\n")
    draft.rename(workdir / "config.json")
    with (workdir / "command.txt").open("a") as file:
        file.write(shlex.join(masked_arguments(sys.argv)) + "\n")
    (workdir / "env.json").write_text(json.dumps(environment() | {"devices": devices}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions and machine. No environment variables: they may hold secrets."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions,
    }


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from ("-dirty" if it was changed); None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(run, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
