"""Runs campaigns, keeps their results in a JSON file after every trial, and writes the matrix as it stands."""

import argparse
import importlib
import json
import os
import pkgutil
import platform
import random
import shutil
import statistics
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import soak
from maejax.workdir import git_commit
from soak import CAMPAIGNS, Campaign, Trial

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


def main() -> int:
    """The command line; 1 if a promise was broken."""
    parser = argparse.ArgumentParser("python -m soak", description=__doc__)
    parser.add_argument("--rows", default="", help="numbers or names of campaigns, with commas (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop to begin new trials after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--trials", type=int, help="how many (default: as many as the campaign promises)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="only write docs/reliability.md from the results")
    options = parser.parse_args()
    for module in pkgutil.iter_modules(soak.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"soak.{module.name}")
    if not options.write:
        chosen = set(options.rows.split(",")) - {""}
        wanted = [c for c in CAMPAIGNS if not chosen or {str(c.row), c.name} & chosen]
        deadline = time.monotonic() + options.seconds
        broken = sum(run(c, options, deadline) for c in sorted(wanted, key=lambda c: c.row))
        print(f"{len(wanted)} campaigns, {broken} with a broken promise; results in {options.results}")
    if options.results == RESULTS:
        from soak import _page

        newest = max((ROOT / "benchmarks" / "results").glob("guards_*.json"))
        PAGE.write_text(_page.page(CAMPAIGNS, read(RESULTS), json.loads(newest.read_text())))
    return int(not options.write and broken > 0)


def read(file: Path) -> dict[str, Any]:
    """Results by the campaign's name."""
    return json.loads(file.read_text()) if file.exists() else {}


def run(c: Campaign, options: argparse.Namespace, deadline: float) -> bool:
    """Runs a campaign's trials until the deadline; returns whether one broke the promise."""
    numbers: dict[str, list[float]] = {}
    failures: list[dict[str, Any]] = []
    start, ran = time.monotonic(), 0
    for number in range(options.first, options.first + (options.trials or c.trials)):
        if time.monotonic() > deadline:
            break
        folder = Path(tempfile.mkdtemp(prefix=f"soak-{c.name}-{number}-"))
        trial = Trial(number, random.Random(f"{options.seed} {c.name} {number}"), folder)
        try:
            for key, value in (c.function(trial) or {}).items():
                numbers.setdefault(key, []).append(float(value))
            shutil.rmtree(folder, ignore_errors=True)
        except Exception:  # whatever it is, the promise was not kept; its folder stays
            print(f"row {c.row} {c.name}, trial {number} (see {folder}):\n{traceback.format_exc()}", flush=True)
            failures.append({"trial": number, "error": traceback.format_exc().strip().splitlines()[-1]})
        ran += 1
        result = {
            "row": c.row, "trials": ran, "held": ran - len(failures), "asked": c.trials, "seed": options.seed,
            "seconds": round(time.monotonic() - start, 1), "failures": failures[:5],
            "numbers": {key: summary(values) for key, values in numbers.items()},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": git_commit(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        }  # fmt: skip
        options.results.write_text(json.dumps(read(options.results) | {c.name: result}, indent=1) + "\n")
    print(
        f"row {c.row:2}  {c.name:40} {ran - len(failures)} of {ran} held, {time.monotonic() - start:.0f} s", flush=True
    )
    return bool(failures)


def summary(values: list[float]) -> dict[str, float]:
    """Smallest, middle and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


if __name__ == "__main__":
    raise SystemExit(main())
