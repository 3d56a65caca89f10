"""Curves as SVG, drawn here so that they are there in print and without a script; page.js lets one read values off."""

import dataclasses
import math
from collections.abc import Sequence

from maejax.reports.page import Element, tag

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26  # margins around the curves, for the numbers
COLORS = 7  # --s0 ... --s6 in page.css, distinguishable for the colour-blind
DASHES = (None, "6 3", "2 2.5", "8 2 2 2")
MOST_POINTS = 400  # of a curve: about one a pixel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve: its color and dash are numbers, so that it looks the same in all charts of a page."""

    name: str
    points: Points
    group: int = 0  # curves of a group have one color and are switched together
    dash: int = 0
    marks: bool = False  # a dot at every point: for few of them
    spread: Sequence[float] = ()  # of each point, drawn as a bar up and down


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points of the same look: of every stretch its lowest and highest one, and both ends."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * (len(points) - 2) / (most - 2))
    kept = [points[0]]
    for first in range(1, len(points) - 1, size):
        stretch = points[first : min(first + size, len(points) - 1)]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number beside an axis: 0.25, 3e-4, 1,500, 12k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}".replace("e-0", "e-")


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to the pixels of the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        """Pixels from the left."""
        low, high = self.x
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - low) / (high - low) if high > low else 0.5)

    def down(self, y: float) -> float:
        """Pixels from the top."""
        low, high = self.y
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((y - low) / (high - low) if high > low else 0.5)


def scale_of(series: Sequence[Series], *, from_zero: bool = False, beside: float = 0.0) -> Scale | None:
    """What holds all finite points of some curves, with a little air; None if there are none.

    `beside` is the air to the left and to the right, as a share of the width.
    """
    points = [p for s in series for p in s.points if math.isfinite(p[1])]
    if not points:
        return None
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    for s in series:
        ys += [y + sign * d for (_, y), d in zip(s.points, s.spread) for sign in (-1, 1) if math.isfinite(y)]
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    air = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    aside = beside * (max(xs) - min(xs))
    return Scale((min(xs) - aside, max(xs) + aside), (low if from_zero else low - air, high + air))


def path(points: Points, scale: Scale) -> str:
    """The path's data, to a tenth of a pixel; it breaks where a value is not finite."""
    parts, down = [], False
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{'L' if down else 'M'}{scale.across(x):.1f} {scale.down(y):.1f}")
        down = math.isfinite(y)
    return "".join(parts)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_name: str = "step",
    from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    percent: bool = False,
    key: bool = False,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    labels: bool = False,
    switched: bool = True,
) -> Element:
    """A figure of curves over steps (or another number) with its axes.

    Args:
      title: of the figure.
      unit: what the numbers are, beside the title.
      from_zero: whether the lowest number of the axis is 0.
      marks: places on the horizontal axis, with what happened there.
      percent: whether values are shares, written as per cent.
      key: whether the heading names the curves.
      x_ticks: places and words below the horizontal axis, where they are not round steps.
      labels: whether each point has its value beside it.
      switched: whether the page's switches show and hide the curves.
    """
    keys = [tag("span", tag("span", class_=f"swatch c{s.group % COLORS}"), s.name, class_="key") for s in series if key]
    heading = tag("figcaption", tag("b", title), unit or None, keys, tag("output", class_="reading"))
    scale = scale_of(series, from_zero=from_zero, beside=0.1 if labels else 0.0)
    if scale is None:
        return tag("figure", heading, tag("p", "nothing written down yet", class_="empty"))
    factor = 100 if percent else 1
    inside = [(x, text) for x, text in marks if scale.x[0] <= x <= scale.x[1]]
    svg = tag(
        "svg",
        _axes(scale, x_name, factor, x_ticks),
        (
            tag(
                "g", tag("title", text), tag("path", d=f"M{scale.across(x):.1f} {TOP}V{HEIGHT - BOTTOM}"), class_="mark"
            )
            for x, text in inside
        ),
        (_curve(s, scale, factor, labels=labels, switched=switched) for s in series),
        tag("circle", r=4, class_="cursor", visibility="hidden"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex=0,
        aria_label=f"{title}: {', '.join(s.name for s in series)}; arrow keys read values",
        data_x=x_name,
        data_unit=" %" if percent else "",
    )
    return tag("figure", heading, svg)


def _axes(scale: Scale, x_name: str, factor: float, x_ticks: Sequence[tuple[float, str]] | None) -> list[Element]:
    elements = []
    for y in ticks(scale.y[0] * factor, scale.y[1] * factor):
        at = f"{scale.down(y / factor):.1f}"
        elements.append(tag("path", d=f"M{LEFT} {at}H{WIDTH - RIGHT}", class_="grid"))
        elements.append(tag("text", number(y), x=LEFT - 7, y=at, dy="0.32em", text_anchor="end"))
    for x, words in x_ticks or [(x, number(x)) for x in ticks(*scale.x)]:
        at = f"{scale.across(x):.1f}"
        elements.append(tag("path", d=f"M{at} {HEIGHT - BOTTOM}v4", class_="axis"))
        elements.append(tag("text", words, x=at, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    elements.append(tag("path", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    if x_ticks is None:  # words leave no room for it
        elements.append(tag("text", x_name, x=LEFT - 7, y=HEIGHT - BOTTOM + 17, text_anchor="end", class_="name"))
    return elements


def _curve(s: Series, scale: Scale, factor: float, *, labels: bool, switched: bool) -> Element:
    points = thin(s.points)
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    places = [(f"{scale.across(x):.1f}", f"{scale.down(y):.1f}") for x, y in finite]
    bars = (
        tag("path", d=f"M{scale.across(x):.1f} {scale.down(y - d):.1f}V{scale.down(y + d):.1f}", class_="spread")
        for (x, y), d in zip(s.points, s.spread)
        if d > 0
    )
    alone = len(finite) == 1
    values = zip(places, finite) if labels else ()
    return tag(
        "g",
        tag("path", d=path(points, scale), stroke_dasharray=DASHES[s.dash % len(DASHES)], class_="line"),
        bars,
        (tag("circle", cx=x, cy=y, r=3.2) for x, y in places) if s.marks or alone else None,
        (
            tag("text", f"{factor * y:.2f}" if factor > 1 else number(y), x=at, y=top, dx=7, dy=-7)
            for (at, top), (_, y) in values
        ),
        class_=f"series c{s.group % COLORS}",
        data_group=s.group if switched else None,
        data_name=s.name,
        data_places=" ".join(f"{x},{y}" for x, y in places),
        data_values=" ".join(f"{x}:{factor * y:.5g}" for x, y in finite),
    )


def legend(groups: Sequence[tuple[int, str]], *, what: str) -> Element:
    """Switches for the groups of curves of all charts on the page."""
    return tag(
        "fieldset",
        tag("legend", what),
        (
            tag(
                "label",
                tag("input", type="checkbox", checked="checked", data_group=group, class_="switch"),
                tag("span", class_=f"swatch c{group % COLORS}"),
                name,
            )
            for group, name in groups
        ),
        class_="legend",
    )
