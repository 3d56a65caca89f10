"""What a sweep found: its points' numbers, seeds folded, ranked by what the encoder is worth, and why by that.

Never by loss where it measures different things: at another mask ratio, mask, target, patch or augmentation, a lower
loss says that the task is easier, not that the encoder is better (in the paper's Figure 5 the best ratio has neither
the lowest nor the highest loss).
"""

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maejax.sweep import Point, State, Sweep, state

# What decides, in this order, of what all finished points have: classifiers have the first, encoders the others.
MEASURES = ("top1", "linear_top1", "knn_top1")
# Losses of points that differ in one of these are not of one task.
OTHER_TASK = (
    "mask", "data", "norm_pix", "objective", "model.patch", "image_size", "finetune.smoothing", "finetune.mixup",
    "finetune.cutmix",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the points that differ only in their seed."""

    settings: dict[str, str]
    points: tuple[Point, ...]
    states: tuple[State, ...]
    values: dict[str, list[float]]  # of the points that are done, by metric, in the order of the seeds
    rank: int | None = None  # 1 is the best; None: not all of its seeds are done, or there is nothing to rank by

    @property
    def kind(self) -> str:
        """done, broken, unfinished or waiting: broken if one seed is, done if all are."""
        kinds = [state.kind for state in self.states]
        for kind in ("broken", "unfinished"):
            if kind in kinds:
                return kind
        return kinds[0] if len(set(kinds)) == 1 else "unfinished"

    def mean(self, metric: str) -> float | None:
        """Over the seeds that are done."""
        values = self.values.get(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two."""
        values = self.values.get(metric, ())
        return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The table: ranked rows first, the best on top, then those that are not done."""

    sweep: Sweep
    keys: tuple[str, ...]  # the columns before the numbers
    metrics: tuple[str, ...]  # the columns of numbers, the one that ranks first
    by: str | None
    why: str
    rows: tuple[Row, ...]


def rank(sweep: Sweep) -> Ranking:
    """Reads what the points have recorded; `sweep` may be in any state."""
    grouped: dict[str, list[Point]] = {}
    for point in sweep.points:
        grouped.setdefault(json.dumps(point.settings, sort_keys=True), []).append(point)
    rows = [_row(points) for points in grouped.values()]
    found = [row for row in rows if row.values]
    metrics = [name for name in _all_metrics(found) if all(name in row.values for row in found)]
    keys = tuple(dict.fromkeys(key for point in sweep.points for key in point.settings))
    other = [key for key in keys if any(key == task or key.startswith(f"{task}.") for task in OTHER_TASK)]
    by = next((name for name in MEASURES if name in metrics), None)
    if other:
        metrics = [name for name in metrics if name != "loss"]  # a column would be read as a ranking
        why = f"never by loss, which is not of one task for every {' and '.join(other)}"
    else:
        why = "losses are of one task"
    if by is None and not other and "loss" in metrics:
        by, why = "loss", "the last logged loss, because there is no evaluation; add --evaluate=knn,linear"
    if by is None:
        why = f"not ranked: no point that is done has an evaluation; {why}" if rows else "no points"
    else:
        why = f"ranked by {by}: {why}"
        metrics.remove(by)
        metrics.insert(0, by)
    return Ranking(sweep=sweep, keys=keys, metrics=tuple(metrics), by=by, why=why, rows=tuple(_ordered(rows, by)))


def _row(points: Sequence[Point]) -> Row:
    states = tuple(state(point) for point in points)
    values: dict[str, list[float]] = {}
    for point, found in zip(points, states, strict=True):
        if found.kind == "done":
            for name, value in numbers(point).items():
                values.setdefault(name, []).append(value)
    return Row(settings=points[0].settings, points=tuple(points), states=states, values=values)


def numbers(point: Point) -> dict[str, float]:
    """What a finished point has recorded: its evaluations, `loss` (the last logged) and `img_per_sec` (the median)."""
    found: dict[str, float] = {}
    for name in point.evals:
        found |= json.loads((point.workdir / "evals" / f"{name}_{point.steps}.json").read_text())["metrics"]
    losses, speeds = [], []
    for line in logged(point.workdir):
        losses += [line["train/loss"]] if "train/loss" in line else []
        speeds += [line["perf/img_per_sec"]] if "perf/img_per_sec" in line else []
    found |= {"loss": losses[-1]} if losses else {}
    return found | ({"img_per_sec": statistics.median(speeds)} if speeds else {})


def logged(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; the last may be half written."""
    file = run / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _all_metrics(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.values if name != "img_per_sec")  # says no worth
    return sorted(names, key=lambda name: name == "loss")


def _ordered(rows: Sequence[Row], by: str | None) -> list[Row]:
    """The rows that are done from the best to the worst, with their ranks, then the others as they were asked for."""
    ready = [row for row in rows if by and row.kind == "done" and math.isfinite(row.mean(by) or math.nan)]
    worth = [(row.mean(by or "") or 0.0) * (-1 if by == "loss" else 1) for row in ready]
    # Equals share a rank.
    ranked = [dataclasses.replace(row, rank=1 + sum(w > own for w in worth)) for row, own in zip(ready, worth)]
    ranked.sort(key=lambda row: row.rank or 0)
    return ranked + [row for row in rows if row not in ready]


# ---- For people and machines ----------------------------------------------------------------------------------------


def as_text(ranking: Ranking) -> str:
    """The table, as Markdown that is aligned, and the line that says why."""
    head = ["rank", *ranking.keys, *ranking.metrics, "seeds", "state"]
    lines = [head, *([*_cells(ranking, row)] for row in ranking.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join([*(f"| {line} |" for line in text), ranking.why])


def _cells(ranking: Ranking, row: Row) -> list[str]:
    numbers = [shown_number(name, row.mean(name), row.spread(name)) for name in ranking.metrics]
    seeds = ", ".join(str(point.seed) for point in row.points)
    return [
        str(row.rank or ""), *(row.settings.get(key, "") for key in ranking.keys), *numbers, seeds, describe(row)
    ]  # fmt: skip


def describe(row: Row) -> str:
    """A row's state in words: what is not done, and how far it is."""
    if row.kind in ("done", "waiting"):
        return row.kind
    parts = []
    for point, found in zip(row.points, row.states, strict=True):
        which = f"seed {point.seed} " if len(row.points) > 1 else ""
        if found.kind == "broken":
            parts.append(f"{which}broken: {found.message.replace('|', '/')}")
        elif found.kind != "done":
            at = f" at step {found.step:,} of {point.steps:,}" if found.kind == "unfinished" else ""
            parts.append(f"{which}{found.kind}{at}")
    return "; ".join(parts)


def shown_number(metric: str, mean: float | None, spread: float | None) -> str:
    """`97.21 % ± 0.14`: accuracies in per cent."""
    if mean is None:
        return ""
    share = metric.endswith("top1") or metric.endswith("top5")
    text = f"{100 * mean:.2f} %" if share else f"{mean:.4g}"
    return text if spread is None else f"{text} ± {100 * spread:.2f}" if share else f"{text} ± {spread:.2g}"


def as_json(ranking: Ranking) -> dict[str, Any]:
    """All of it, for machines."""
    rows = [
        {
            "rank": row.rank,
            "settings": row.settings,
            "state": row.kind,
            "metrics": {
                name: {"mean": row.mean(name), "spread": row.spread(name), "values": values}
                for name, values in row.values.items()
            },
            "points": [
                {"name": p.name, "seed": p.seed, "workdir": str(p.workdir), "steps": p.steps} | dataclasses.asdict(s)
                for p, s in zip(row.points, row.states, strict=True)
            ],
        }
        for row in ranking.rows
    ]
    return {"sweep": str(ranking.sweep.workdir), "ranked_by": ranking.by, "why": ranking.why, "rows": rows}


def as_csv(ranking: Ranking) -> str:
    """A line a row; of each metric mean and spread."""
    out = io.StringIO()
    columns = ["rank", *ranking.keys, *(c for m in ranking.metrics for c in (m, f"{m}_spread")), "seeds", "state"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in ranking.rows:
        numbers = [value for name in ranking.metrics for value in (row.mean(name), row.spread(name))]
        seeds = " ".join(str(point.seed) for point in row.points)
        writer.writerow([row.rank, *(row.settings.get(key) for key in ranking.keys), *numbers, seeds, row.kind])
    return out.getvalue()


def series(ranking: Ranking, metric: str) -> tuple[str, Mapping[str, list[tuple[str, float, float]]]]:
    """For a plot: the key along x, and by the other keys' values, lists of (x, mean, spread) in the grid's order."""
    keys = ranking.keys or ("seed",)
    many = {key: len({row.settings.get(key, "") for row in ranking.rows}) for key in keys}
    along = max(keys, key=lambda key: many[key])
    lines: dict[str, list[tuple[str, float, float]]] = {}
    asked = {json.dumps(p.settings, sort_keys=True): i for i, p in reversed(list(enumerate(ranking.sweep.points)))}
    for row in sorted(ranking.rows, key=lambda row: asked[json.dumps(row.settings, sort_keys=True)]):
        if (mean := row.mean(metric)) is not None:
            rest = ", ".join(f"{key}={row.settings.get(key)}" for key in keys if key != along and many[key] > 1)
            lines.setdefault(rest, []).append((row.settings.get(along, ""), mean, row.spread(metric) or 0.0))
    return along, lines
