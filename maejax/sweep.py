"""A sweep: one run a point of a grid, all in one folder; what was asked for, and how far each point is.

    runs/ratios/sweep.json      what was asked, and the points; written before the first of them starts
    runs/ratios/ratio=0.5/      a point: an ordinary run, which resumes on its own; `ratio=0.5,seed=1` has another seed
    runs/ratios/logs/           what each point's process printed
    runs/ratios/failures.json   why points broke
    runs/ratios/report.html     the table, its picture and the curves

To read one: `read(workdir)` is the sweep with its `points`, `state(point)` how far one is; `ranking.rank(sweep)` is the
table, seeds folded. Nothing here needs a device or the data.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from maejax import bounded
from maejax import config as configs
from maejax.errors import UsageError
from maejax.manifest import sealed_steps
from maejax.overrides import ALIASES
from maejax.workdir import lock

FILE, FAILURES = "sweep.json", "failures.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    name: str  # of its folder
    workdir: Path
    settings: dict[str, str]  # the swept keys but the seed, with their values for people: {"mask.ratio": "0.5"}
    seed: int
    steps: int  # its length
    evals: tuple[str, ...]  # it is done when these have been recorded
    computes: dict[str, Any]  # what in its config is not the default, execution left out; the same: the same point
    arguments: tuple[str, ...]  # of `maejax`; only --workdir is missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a sweep was asked for; the same again continues it."""

    verb: str = "pretrain"  # or finetune
    config: str | None = None  # a recipe
    start_from: str | None = None  # a run
    assignments: dict[str, str]  # the same for all points
    grid: dict[str, list[str]]  # values by key, seeds among them
    paired: bool = False  # the first values of all keys make the first point, and so on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A folder with a sweep.json."""

    workdir: Path
    request: Request
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """How far a point is: `kind` is done, unfinished, broken or waiting (nothing of it is there yet)."""

    kind: str
    step: int = 0  # of its newest checkpoint
    message: str = ""  # why it broke


# ---- Grids ----------------------------------------------------------------------------------------------------------


def parse_grid(texts: Sequence[str], seeds: str | None) -> dict[str, list[str]]:
    """{"mask.ratio": ["0.5", "0.75"]} of `config.mask.ratio=0.5,0.75`; `seeds` is one more dimension.

    Raises:
      UsageError: a value is missing, or a key is there twice.
    """
    grid: dict[str, list[str]] = {}
    for text in [*texts, *([f"seed={seeds}"] if seeds is not None else [])]:
        key, equals, values = text.partition("=")
        key = key.lstrip("-").removeprefix("config.")
        key = ALIASES.get(key, key)
        found = [value.strip() for value in values.split(",")]
        if not equals or not key or not all(found):
            shown = f"--seeds={seeds}" if key == "seed" and seeds is not None else f"--grid {text}"
            raise UsageError(f"{shown} lacks a value; write KEY=A,B,C, for example --grid config.mask.ratio=0.5,0.75")
        for other in grid:
            if same_key(key, other):
                raise UsageError(f"{key} and {other} are one dimension; give all its values in one --grid")
        grid[key] = found
    return grid


def same_key(left: str, right: str) -> bool:
    """Whether two keys set the same thing: one of them, or a duration in other units."""
    (one, _, unit), (two, _, other) = (ALIASES.get(key, key).rpartition("_") for key in (left, right))
    duration = one in configs.DURATIONS and one == two and {unit, other} <= {"steps", "epochs", "examples"}
    return duration or ALIASES.get(left, left) == ALIASES.get(right, right)


def expand(grid: Mapping[str, Sequence[str]], *, paired: bool) -> list[dict[str, str]]:
    """The assignments of every point: all combinations, or pairs of the n-th values; seeds are always combined."""
    keys = [key for key in grid if key != "seed"]
    if paired:
        lengths = {key: len(grid[key]) for key in keys}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise UsageError(f"--zip needs lists of one length: {listed}")
        combined = list(zip(*(grid[key] for key in keys), strict=True)) or [()]
    else:
        combined = list(itertools.product(*(grid[key] for key in keys)))
    found = [dict(zip(keys, values, strict=True)) for values in combined]
    return [point | {"seed": seed} for point in found for seed in grid["seed"]] if "seed" in grid else found


def for_overrides(base: ConfigDict, key: str, text: str) -> str:
    """A value as `--config.KEY` takes it: `32x48` is 32,48 where a key has several numbers."""
    known = dict(configs.flatten(base))
    return text.replace("x", ",") if isinstance(known.get(key), tuple) else text


def shown(value: Any) -> str:
    """A config's value, as it stands in names and tables."""
    if isinstance(value, tuple):
        return "x".join(shown(number) for number in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def name_of(settings: Mapping[str, str], seed: int | None) -> str:
    """`ratio=0.5,seed=1`: the last parts of the keys, more of them where two are alike; fit for a folder."""
    leaves = [key.rpartition(".")[2] for key in settings]
    parts = [
        f"{leaf if leaves.count(leaf) == 1 else key}={value}"
        for leaf, (key, value) in zip(leaves, settings.items(), strict=True)
    ]
    parts += [f"seed={seed}"] if seed is not None or not parts else []
    return re.sub(r"[^\w.=,+-]", "-", ",".join(parts)).lstrip(".-")


def computes(c: ConfigDict) -> dict[str, Any]:
    """What a config computes: the keys that differ from the default, those of execution left out."""
    changed = configs.differences(configs.default(), c)
    return json.loads(json.dumps({key: new for key, (_, new) in changed.items() if not configs.only_execution(key)}))


# ---- The folder -----------------------------------------------------------------------------------------------------


def read(workdir: Path) -> Sweep:
    """The sweep in a folder; raises UsageError if there is none."""
    file = workdir / FILE
    if not file.is_file():
        raise UsageError(f"{workdir} is not a sweep: it has no {FILE}")
    try:
        content = bounded.read_json(file)
        request = Request(**content["request"])
        points = tuple(
            Point(
                **point | {"workdir": workdir / point["name"], "evals": tuple(point["evals"])}
                | {"arguments": tuple(point["arguments"])}
            )
            for point in content["points"]
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{file} cannot be read ({error}); restore it or choose another --workdir") from error
    return Sweep(workdir=workdir, request=request, points=points)


def is_sweep(workdir: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (workdir / FILE).is_file()


def write(sweep: Sweep) -> None:
    """Writes sweep.json, whole or not at all."""
    points = []
    for point in sweep.points:
        points.append(dataclasses.asdict(point))
        del points[-1]["workdir"]  # a sweep may be moved
    content = {"format": FORMAT, "request": dataclasses.asdict(sweep.request), "points": points}
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    draft = sweep.workdir / f"{FILE}.draft"
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.rename(sweep.workdir / FILE)


def continued(before: Sweep, now: Sweep) -> Sweep:
    """`now`, its points in the folders that `before` gave to those that compute the same.

    Raises:
      UsageError: `before` has a point that `now` lacks, with the difference. More points may be added.
    """
    for key in ("verb", "start_from"):
        old, new = getattr(before.request, key), getattr(now.request, key)
        if old != new:
            flag = {"verb": "--verb", "start_from": "--from"}[key]
            raise UsageError(f"{before.workdir} holds a sweep with {flag}={old}, not {new}; choose another --workdir")
    there = {_identity(point): point for point in before.points}
    asked = {_identity(point) for point in now.points}
    for identity, point in there.items():
        if identity not in asked:
            difference = min((_differences(point, other) for other in now.points), key=len)
            raise UsageError(
                f"{before.workdir} holds a sweep whose point {point.name} this one lacks ({'; '.join(difference)}); "
                "give its values too (more may be added), or choose another --workdir"
            )
    points = []
    for point in now.points:
        if old_point := there.get(_identity(point)):
            point = dataclasses.replace(point, name=old_point.name, workdir=old_point.workdir)
        points.append(point)
    names = [point.name for point in points]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two points would share the folder {double}; choose another --workdir")
    return dataclasses.replace(now, points=tuple(points))


def _identity(point: Point) -> str:
    return json.dumps(point.computes, sort_keys=True)


def _differences(old: Point, new: Point) -> list[str]:
    default = json.loads(json.dumps(dict(configs.flatten(configs.default()))))
    before, after = ({**default, **point.computes} for point in (old, new))
    return [f"{key} was {before[key]}, now {after[key]}" for key in after if before.get(key) != after[key]]


# ---- How far a point is ---------------------------------------------------------------------------------------------


def state(point: Point) -> State:
    """What the files of a point say; nothing is kept of its processes but why one broke."""
    sealed = sealed_steps(point.workdir / "checkpoints")
    step = sealed[-1] if sealed else 0
    if point.steps in sealed and all(file.exists() for file in _last_records(point)):
        return State(kind="done", step=point.steps)
    if message := failures(point.workdir.parent).get(point.name):
        return State(kind="broken", step=step, message=message)
    return State(kind="unfinished" if (point.workdir / "config.json").exists() else "waiting", step=step)


def _last_records(point: Point) -> list[Path]:
    # Pretraining ends with the same encoder untrained, as step 0.
    steps = (point.steps,) if point.computes.get("objective") == "classify" else (point.steps, 0)
    return [point.workdir / "evals" / f"{name}_{step}.json" for name in point.evals for step in steps]


def is_running(point: Point) -> bool:
    """Whether some process trains a point right now. To be asked only by who is about to start it."""
    if not point.workdir.exists():
        return False
    try:
        lock(point.workdir, patience=0).close()
    except UsageError:
        return True
    return False


def failures(workdir: Path) -> dict[str, str]:
    """Why points broke, by name."""
    file = workdir / FAILURES
    return json.loads(file.read_text()) if file.exists() else {}


def note_failure(workdir: Path, name: str, message: str | None) -> None:
    """Remembers why a point broke; None: it has not, or is tried again."""
    known = failures(workdir)
    if message is None and name not in known:
        return
    known.pop(name, None)
    draft = workdir / f"{FAILURES}.draft"
    draft.write_text(json.dumps(known | ({name: message} if message is not None else {}), indent=2) + "\n")
    draft.rename(workdir / FAILURES)
