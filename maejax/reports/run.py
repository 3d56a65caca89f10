"""The report of one run: what it was, how it went, what it is worth, and what went wrong on the way."""

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.metrics import duration, shown
from maejax.record import Points, Record, Start
from maejax.reports.charts import Series, chart
from maejax.reports.page import Child, Element, facts, fold, page, section, table, tag
from maejax.reports.pictures import slider

CURVES = (  # metric, title, unit, whether its axis begins at 0
    ("train/loss", "Loss", "of the objective", False),
    ("train/lr", "Learning rate", "", True),
    ("train/grad_norm", "Gradient norm", "", True),
    ("perf/img_per_sec", "Throughput", "images a second", True),
)


def run_page(record: Record, now: datetime) -> str:
    """The page of a run."""
    return page(
        f"{record.folder.absolute().name} · maejax",
        *heading(record, now),
        curves(record),
        reconstructions(record),
        evaluations(record),
        starts(record, now),
        bad_images(record),
        config_tables(record.config),
        origins(record),
        footer(now),
    )


def footer(now: datetime) -> Element:
    """When the page was made."""
    return tag("footer", f"Written by maejax report on {now:%Y-%m-%d at %H:%M}. This file needs no network.")


def heading(record: Record, now: datetime) -> list[Element]:
    """The name, how far the run has come, its most wanted numbers, and how it described itself."""
    numbers: list[tuple[str, str]] = []
    total = record.total_steps
    numbers.append(("steps" if total is None else f"of {total:,} steps", f"{record.step:,}"))
    if loss := _last(record.metrics.get("train/loss", [])):
        numbers.append((f"loss at step {loss[0]:,}", f"{loss[1]:.4g}"))
    for metric, points in record.evals.items():
        if trained := _last([point for point in points if point[0] > 0]):
            numbers.append((metric, shown(metric, trained[1])))
    if speed := _last(record.metrics.get("perf/img_per_sec", [])):
        numbers.append(("images a second", f"{speed[1]:,.0f}"))
    if record.starts:
        seconds = sum((start.last_time - start.time).total_seconds() for start in record.starts)
        numbers.append(("running time", duration(seconds)))
    return [
        tag("h1", record.folder.absolute().name),
        tag("p", state(record, now), class_="lead"),
        tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in numbers), class_="figures"),
        section("The run", facts(record.summary) if record.summary else tag("p", "not started yet", class_="empty")),
    ]


def state(record: Record, now: datetime) -> str:
    """How the run stands, in a few words."""
    if not record.starts:
        return "has not started yet"
    last = record.starts[-1]
    if last.end:
        return f"{_ended(last)} {last.last_time:%Y-%m-%d %H:%M}"
    silent = max(0.0, (now - last.last_time).total_seconds())
    return f"at step {record.step:,}; last heard of {duration(silent)} before this page was written"


def _ended(start: Start) -> str:
    return "finished" if start.end == "finished" else f"ended with: {start.end};"


def curves(record: Record) -> Element:
    """Loss, learning rate, gradient norm, throughput, and evaluations if there were several."""
    marks = [(s.first_step, f"resumed at step {s.first_step:,}") for s in record.starts if s.first_step]
    charts = [
        chart(
            title, [Series(name=title, points=record.metrics.get(metric, []))], unit=unit, from_zero=from_zero,
            marks=marks,
        )
        for metric, title, unit, from_zero in CURVES
    ]  # fmt: skip
    accuracies = [metric for metric, points in record.evals.items() if metric.endswith("top1") and len(points) > 1]
    if any(len(record.evals[metric]) > 2 for metric in accuracies):
        series = [
            Series(name=metric, points=record.evals[metric], group=index, marks=True)
            for index, metric in enumerate(accuracies)
        ]
        charts.append(chart("Accuracy", series, unit="per cent", percent=True, key=True))
    note = "Dashed marks are resumptions." if marks else None
    return section("Curves", tag("div", charts, class_="charts"), note=note)


def reconstructions(record: Record) -> Element | None:
    """The slider over what the network made of hidden patches as training went on."""
    size = configs.pair(record.config.image_size)
    pictures = slider([(f"{step:,}", path, size) for step, path in record.pictures], what="step")
    return section("Reconstructions", pictures) if pictures is not None else None


def evaluations(record: Record) -> Element | None:
    """Every metric, untrained and trained."""
    if not record.evals:
        return None
    steps = sorted({step for points in record.evals.values() for step, _ in points})
    if len(steps) > 7:  # both ends, and what lies evenly between them
        steps = [steps[round(i * (len(steps) - 1) / 6)] for i in range(7)]

    def cell(metric: str, step: int) -> str:
        values = dict(record.evals[metric])
        return shown(metric, values[step]) if step in values else ""

    return section(
        "Evaluations",
        table(
            ["", *("untrained" if step == 0 else f"step {step:,}" for step in steps)],
            [[metric, *(cell(metric, step) for step in steps)] for metric in record.evals],
        ),
        note=f"On {'; '.join(dict.fromkeys(record.measured_on.values()))}.",
    )


def starts(record: Record, now: datetime) -> Element | None:
    """Faults and restarts: every process of the run, how far it came and why it ended."""
    if not record.starts:
        return None
    rows: list[list[Child]] = []
    for index, start in enumerate(record.starts):
        newest = index == len(record.starts) - 1
        unknown = "running, or killed without a word" if newest else "killed without a word"
        rows.append(
            [
                tag("time", f"{start.time:%Y-%m-%d %H:%M:%S}"),
                f"{start.first_step:,}",
                f"{start.last_step:,}",
                duration((start.last_time - start.time).total_seconds()),
                start.end or unknown,
                [tag("div", note) for note in start.notes],
            ]
        )
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    header = ["started", "from step", "to step", "for", "ended", "noted"]
    if not any(start.notes for start in record.starts):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return section("Starts and faults", table(header, rows, kind="text"), note=f"Started {times}.")


def bad_images(record: Record) -> Element:
    """Images that could not be read, by cause."""
    counts = record.bad_images
    if not counts:
        return section("Bad images", tag("p", "None: every image could be read.", class_="note"))
    rows = [[cause, f"{count:,}"] for cause, count in counts.most_common()]
    note = f"Read {counts.total():,} times and replaced by others; bad_images.jsonl names them."
    return section("Bad images", table(["cause", "times"], rows), note=note)


def config_tables(config: ConfigDict, *, leave_out: Iterable[str] = ()) -> Element:
    """What differs from the default, and every key with that highlighted; without those in `leave_out`."""
    usual, left = dict(configs.flatten(configs.default())), set(leave_out)
    own = [(key, value) for key, value in configs.flatten(config) if key not in left]
    changed = [(key, value) for key, value in own if value != usual[key]]

    def listing(pairs: list[tuple[str, Any]], *, highlight: bool) -> Element:
        rows = ([tag("code", text) for text in (key, _short(value), _short(usual[key]))] for key, value in pairs)
        differs = ["changed" if highlight and value != usual[key] else None for key, value in pairs]
        return table(["key", "here", "default"], rows, kind="text keys", row_kinds=differs)

    return section(
        "Config",
        listing(changed, highlight=False) if changed else None,
        fold(f"all {len(own)} keys", listing(own, highlight=True)),
        note=f"{len(changed)} of {len(own)} keys differ from the default.",
    )


def _short(value: Any) -> str:
    if value is None or value == "":
        return "unset" if value is None else '""'
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def origins(record: Record) -> Element:
    """Commands, environment and folder: what it takes to do it again."""
    commands: dict[str, int] = {}
    for command in record.commands:
        commands[command] = commands.get(command, 0) + 1
    known = [(name, value) for name, value in record.environment.items() if not isinstance(value, dict)]
    versions = record.environment.get("versions")
    if isinstance(versions, dict):
        known.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return section(
        "Commands and environment",
        (tag("pre", f"{command}{f'   # {times} times' if times > 1 else ''}") for command, times in commands.items()),
        facts((name, str(value)) for name, value in known),
    )


def _last(points: Points) -> tuple[int, float] | None:
    finite = [point for point in points if math.isfinite(point[1])]
    return finite[-1] if finite else None
