"""What a run has written down, read back: metrics, evaluations, pictures, starts and ends. No device is touched.

A run may be under way while it is read, or have been killed at any moment: lines that are not whole are left out.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from maejax.errors import UsageError
from maejax.workdir import stored_config

Points = list[tuple[int, float]]  # (step, value), in order
STAMP = "%Y-%m-%d %H:%M:%S"


@dataclasses.dataclass
class Start:
    """One process of a run, from its start to its end or to where nothing more is known of it."""

    time: datetime
    last_time: datetime
    first_step: int = 0  # 0: new; otherwise resumed here
    last_step: int = 0
    end: str = ""  # why it ended; empty if nobody wrote that down: it runs, or was killed
    notes: list[str] = dataclasses.field(default_factory=list)  # changes of execution, damaged checkpoints, warnings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """All that a run's folder tells."""

    folder: Path
    config: ConfigDict
    metrics: dict[str, Points]  # by name, as train/loss
    evals: dict[str, Points]  # by metric, as knn_top1; step 0 is the untrained network
    measured_on: dict[str, str]  # by metric, for people
    pictures: list[tuple[int, Path]]  # by step
    bad_images: Counter[str]  # by cause
    starts: list[Start]
    summary: list[tuple[str, str]]  # what the run said of itself when it started last: (data, ...), (model, ...)
    total_steps: int | None
    commands: list[str]
    environment: dict[str, Any]

    @property
    def step(self) -> int:
        """The newest step that is known of."""
        return max([0, *(start.last_step for start in self.starts), *(p[-1][0] for p in self.metrics.values() if p)])


def read(run: Path) -> Record:
    """Reads a run's folder; raises UsageError if it is none."""
    config = stored_config(run)
    if config is None:
        raise UsageError(f"{run} is not a run of maejax: it has no config.json")
    starts, summary = read_log(run / "train.log")
    evals, measured_on = read_evals(run / "evals")
    length = re.match(r"([\d,]+) steps", dict(summary).get("length", ""))
    pictures = [(_step_of(path), path) for path in (run / "pictures").glob("reconstruction_*.png")]
    return Record(
        folder=run,
        config=config,
        metrics=read_metrics(run / "metrics.jsonl"),
        evals=evals,
        measured_on=measured_on,
        pictures=sorted((step, path) for step, path in pictures if step is not None),
        bad_images=Counter(str(line.get("cause")) for line in json_lines(run / "bad_images.jsonl")),
        starts=starts,
        summary=summary,
        total_steps=int(length[1].replace(",", "")) if length else config.total_steps,
        commands=_text(run / "command.txt").splitlines(),
        environment=_json(run / "env.json"),
    )


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that are not whole."""
    for line in _text(path).splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


def read_metrics(path: Path) -> dict[str, Points]:
    """Every number of metrics.jsonl, by name; values that are not finite are kept, for they tell of a divergence."""
    found: dict[str, Points] = {}
    for line in json_lines(path):
        step = line.get("step")
        for name, value in line.items():
            if isinstance(step, int) and "/" in name and isinstance(value, int | float):
                found.setdefault(name, []).append((step, float(value)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def read_evals(folder: Path) -> tuple[dict[str, Points], dict[str, str]]:
    """Values by metric and step, and what each metric was measured on."""
    found: dict[str, Points] = {}
    measured_on = {}
    for file in sorted(folder.glob("*_*.json")):
        step, result = _step_of(file), _json(file)
        metrics = result.get("metrics")
        if step is None or not isinstance(metrics, dict):
            continue
        images = result.get("images") or {}
        numbers = " and ".join(f"{count:,} {split} images" for split, count in images.items())
        for metric, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(metric, []).append((step, float(value)))
                measured_on[metric] = f"{result.get('data')}: {numbers}"
    return {metric: sorted(points) for metric, points in found.items()}, measured_on


# ---- train.log ------------------------------------------------------------------------------------------------------

PROGRESS = re.compile(r"step (\d+)/\d+ ")
RESUMED = re.compile(r"resuming at step (\d+)")
CHANGED = re.compile(r"\S+ changed from .* to ")
FAULT = re.compile(r"checkpoint \S+ is damaged|warning: ")
SUMMARY = ("data", "model", "classes", "mask", "mesh", "batch", "lr", "length")
# First words of what a process says once it has the folder; before that it tells of images and of changes.
HEARD = (*SUMMARY, "run", "resuming", "starting", "first", "step", "checkpoint", "warning:", "done", "ended")


def read_log(path: Path) -> tuple[list[Start], list[tuple[str, str]]]:
    """The starts of a run, and how the last one described the run."""
    starts: list[Start] = []
    summary: dict[str, str] = {}
    changes: list[str] = []  # said before the start that they belong to
    for time, text in _log_lines(path):
        word, _, rest = text.partition(" ")
        if word == "run":
            starts.append(Start(time=time, last_time=time, notes=changes))
            changes, summary = [], {}
        elif CHANGED.match(text):
            changes.append(text)
        if not starts or word not in HEARD:
            continue
        start = starts[-1]
        start.last_time = time
        if match := RESUMED.match(text):
            start.first_step = start.last_step = int(match[1])
        elif match := PROGRESS.match(text):
            start.last_step = int(match[1])
        elif word == "done":
            start.end = "finished"
        elif word == "ended":
            start.end = rest.strip()
        elif FAULT.match(text):
            start.notes.append(text)
        elif word in SUMMARY:
            summary[word] = rest.strip()
    return starts, list(summary.items())


def _log_lines(path: Path) -> Iterator[tuple[datetime, str]]:
    for line in _text(path).splitlines():
        try:
            yield datetime.strptime(line[:19], STAMP), line[20:]
        except ValueError:
            continue


# ---- Files that may not be there ------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _step_of(path: Path) -> int | None:
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else None
