"""The report of a sweep: its ranked table, a picture like the paper's Figure 5, the curves of all points together."""

import math
from collections.abc import Sequence
from datetime import datetime

from maejax import config as configs
from maejax import ranking as rankings
from maejax.metrics import duration
from maejax.ranking import Ranking, Row
from maejax.record import Record, read
from maejax.reports.charts import COLORS, Series, chart, legend
from maejax.reports.page import Child, Element, facts, page, section, table, tag
from maejax.reports.pictures import slider
from maejax.reports.run import CURVES, config_tables, footer
from maejax.sweep import Point, State, Sweep


def sweep_page(sweep: Sweep, now: datetime) -> str:
    """The page of a sweep, in any state."""
    found = rankings.rank(sweep)
    records = {p.name: read(p.workdir) for p in sweep.points if (p.workdir / "config.json").is_file()}
    rows = in_order(found)
    first = next(iter(records.values()), None)
    name = sweep.workdir.absolute().name
    return page(
        f"{name} · maejax",
        tag("h1", name),
        tag("p", standing(found), class_="lead"),
        ranked(found, rows),
        figure(found),
        curves(rows, records),
        reconstructions(rows, records),
        points(rows, records),
        config_tables(first.config, leave_out=[*found.keys, "seed"]) if first else None,
        asked(sweep),
        footer(now),
    )


def in_order(found: Ranking) -> list[Row]:
    """The rows as they were asked for: colors go with values, not with ranks."""
    places = {point.name: place for place, point in enumerate(found.sweep.points)}
    return sorted(found.rows, key=lambda row: places[row.points[0].name])


def name_of(row: Row) -> str:
    """A row's settings in a few words: ratio=0.5."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row.settings.items()) or "all seeds"


def standing(found: Ranking) -> str:
    """How many points there are, and how far they are."""
    kinds = [state.kind for row in found.rows for state in row.states]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("done", "unfinished", "waiting", "broken") if kind in kinds]
    seeds = {point.seed for point in found.sweep.points}
    over = f", {len(seeds)} seeds each" if len(seeds) > 1 and len(kinds) == len(seeds) * len(found.rows) else ""
    return f"{len(kinds)} points{over}: {', '.join(counts)}"


def ranked(found: Ranking, rows: Sequence[Row]) -> Element:
    """The table, the best on top, and why it is ranked as it is."""
    header = ["rank", *found.keys, *found.metrics, "seeds", "state"]
    cells: list[list[Child]] = []
    for row in found.rows:
        numbers = [rankings.shown_number(name, row.mean(name), row.spread(name)) for name in found.metrics]
        seeds = ", ".join(str(point.seed) for point in row.points)
        swatch = tag("span", class_=f"swatch c{rows.index(row) % COLORS}")
        place = tag("span", swatch, str(row.rank or "–"), class_="key")
        settings = [row.settings.get(key, "") for key in found.keys]
        cells.append([place, *settings, *numbers, seeds, rankings.describe(row)])
    spread = "" if all(len(row.points) == 1 for row in rows) else " Mean ± standard deviation over seeds."
    return section(
        "Ranking", table(header, cells, kind="ranking"), note=f"{found.why[:1].upper()}{found.why[1:]}.{spread}"
    )


def figure(found: Ranking) -> Element | None:
    """Accuracy over the value, a panel a measure, like the paper's Figure 5."""
    charts = []
    for metric in (name for name in rankings.MEASURES if name in found.metrics):
        along, lines = rankings.series(found, metric)
        at = places([x for line in lines.values() for x, _, _ in line])
        series = []
        for number, (name, line) in enumerate(lines.items()):
            drawn = sorted((at[x], mean, spread) for x, mean, spread in line)
            group = number if len(lines) > 1 else COLORS - 1  # grey: the other colors are the rows'
            means, spreads = [(x, mean) for x, mean, _ in drawn], [spread for *_, spread in drawn]
            series.append(
                Series(name=name or metric, points=means, group=group, dash=number, marks=True, spread=spreads)
            )
        labels = [(place, text) for text, place in at.items()]
        charts.append(
            chart(
                metric, series, unit=f"per cent, over {along}", x_name=along, x_ticks=labels, percent=True,
                key=len(series) > 1, labels=True, switched=False,
            )
        )  # fmt: skip
    if not charts:
        return None
    return section("Accuracy by setting", tag("div", charts, class_="charts"), note="As the paper's Figure 5.")


def places(values: Sequence[str]) -> dict[str, float]:
    """Where each value stands: to scale if all are numbers, else one beside the other."""
    distinct = list(dict.fromkeys(values))
    try:
        numbers = [float(value) for value in distinct]
    except ValueError:
        numbers = []
    if len(set(numbers)) < len(distinct) or not all(map(math.isfinite, numbers)):
        numbers = [float(place) for place in range(len(distinct))]
    return dict(zip(distinct, numbers))


def curves(rows: Sequence[Row], records: dict[str, Record]) -> Element:
    """The curves of all points in the same axes; seeds differ in their dashes."""
    seeds = sorted({point.seed for row in rows for point in row.points})
    charts = []
    for metric, title, unit, from_zero in CURVES:
        series = [
            Series(name=point.name, points=records[point.name].metrics.get(metric, []), group=group,
                   dash=seeds.index(point.seed))
            for group, row in enumerate(rows) for point in row.points if point.name in records
        ]  # fmt: skip
        charts.append(chart(title, series, unit=unit, from_zero=from_zero))
    switches = legend([(group, name_of(row)) for group, row in enumerate(rows)], what="Show")
    note = f"Solid lines are seed {seeds[0]}; other seeds are dashed." if len(seeds) > 1 else None
    return section("Curves", switches, tag("div", charts, class_="charts"), note=note)


def reconstructions(rows: Sequence[Row], records: dict[str, Record]) -> Element | None:
    """The newest picture of every setting's first seed."""
    found = []
    for row in rows:
        record = records.get(row.points[0].name)
        if record and record.pictures:
            found.append((name_of(row), record.pictures[-1][1], configs.pair(record.config.image_size)))
    pictures = slider(found, what="point")
    return (
        section("Reconstructions", pictures, note="The newest picture of each first seed.")
        if pictures is not None
        else None
    )


def points(rows: Sequence[Row], records: dict[str, Record]) -> Element:
    """Every run: how far it is, and what went wrong on the way."""
    cells = [
        _cells(point, state, records.get(point.name))
        for row in rows
        for point, state in zip(row.points, row.states, strict=True)
    ]
    header = ["run", "state", "step", "for", "starts", "bad images", "noted"]
    if not any(line[-1] for line in cells):
        header, cells = header[:-1], [line[:-1] for line in cells]
    return section("Points", table(header, cells, kind="text"))


def _cells(point: Point, state: State, record: Record | None) -> list[Child]:
    if record is None:
        return [point.name, state.kind, f"0 of {point.steps:,}", "", "0", "", state.message]
    seconds = sum((start.last_time - start.time).total_seconds() for start in record.starts)
    ends = [start.end for start in record.starts if start.end not in ("", "finished")]
    said = dict.fromkeys([*ends, *(note for start in record.starts for note in start.notes), state.message])
    return [
        point.name, state.kind, f"{record.step:,} of {point.steps:,}", duration(seconds), str(len(record.starts)),
        str(record.bad_images.total()), [tag("div", text) for text in said if text],
    ]  # fmt: skip


def asked(sweep: Sweep) -> Element:
    """What the sweep was asked for."""
    request = sweep.request
    pairs = [("verb", request.verb), ("recipe", request.config), ("starts from", request.start_from)]
    pairs += [(key, ", ".join(values)) for key, values in request.grid.items()]
    pairs += [(f"every point's {key}", value) for key, value in request.assignments.items()]
    return section("What was asked", facts((name, value) for name, value in pairs if value))
