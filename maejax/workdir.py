"""A run's directory: opened new or to resume, refused when it is somebody else's or when the config has changed.

config.json command.txt env.json train.log metrics.jsonl bad_images.jsonl unusable_records.jsonl skipped.jsonl
rollbacks.json tensorboard/ checkpoints/ pictures/ evals/
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
import time
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from maejax import bounded
from maejax import config as configs
from maejax.errors import UsageError
from maejax.redact import masked_arguments

IMPORTED = "imported"  # in the place of a fingerprint of images
LOCK = ".lock"  # held by the process that runs here
PATIENCE = 0.5  # seconds
LAUNCH = "launch"  # what `maejax launch` writes, before there is a run
PACKAGES = (
    "maejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "simplejpeg",
    "cykooz.resizer",
)  # fmt: skip


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


def check_free(workdir: Path) -> None:
    """Raises UsageError if another run holds the directory: early, before anything slow; `lock` takes it later."""
    if (workdir / LOCK).is_file():
        with (workdir / LOCK).open() as file:
            _take(file, workdir, fcntl.LOCK_SH)


def lock(workdir: Path, *, patience: float = PATIENCE) -> TextIO:
    """Holds the directory for this process for as long as the returned file is open; refuses a second run.

    `patience`: seconds that another process, which may only have a look, gets to let go of it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written to: {error.strerror}") from error
    _take(file, workdir, fcntl.LOCK_EX, patience)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def _take(file: TextIO, workdir: Path, kind: int, patience: float = PATIENCE) -> None:
    """Locks a file; raises UsageError, and closes it, if another run holds it or the file system has no locks."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            file.seek(0)
            holder = file.read(200).strip().partition("\n")[0]
            problem = f"another run is writing to {workdir}{f' ({holder})' if holder else ''}; wait for it"
        except OSError as error:
            problem = f"{workdir} cannot be locked against a second run ({error.strerror}); mount it with locks"
        file.close()
        raise UsageError(f"{problem} or choose another --workdir") from None


def check_images(run: Path, there: str, images: str) -> None:
    """Raises UsageError if a checkpoint says that `run` has seen other images than these fingerprints' ones."""
    if there == IMPORTED:
        raise UsageError(f"{run} has imported weights and saw no images; start a new --workdir with --from={run}")
    if there != images:
        raise UsageError(
            f"the images are not those that {run} was started with; restore them, or start a new --workdir with "
            f"--from={run}"
        )


def record_start(workdir: Path, config: ConfigDict, devices: str) -> None:
    """Writes config.json, appends the command, and notes the environment."""
    draft = workdir / "config.json.draft"
    draft.write_text(json.dumps(configs.to_dict(config), indent=2) + "\n")
    draft.rename(workdir / "config.json")
    with (workdir / "command.txt").open("a") as file:
        file.write(shlex.join(masked_arguments(sys.argv)) + "\n")
    (workdir / "env.json").write_text(json.dumps(environment() | {"devices": devices}, indent=2) + "\n")


def write_durably(file: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all, and stays when the machine goes down."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    draft.rename(file)
    directory = os.open(file.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


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
