"""A sweep's table as a picture like the paper's Figure 5: accuracy over the value, a panel a measure, in SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from maejax.ranking import Ranking, series

Line = Sequence[tuple[str, float, float]]  # x, mean, spread
WIDTH, HEIGHT = 560, 260  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 36, 30, 46
COLORS = ("#1f6fb4", "#c8501e", "#2b8a3e", "#8a4fbf", "#a06a00", "#b0307a")
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #222 } .axis { stroke: #888; fill: none } .grid { stroke: #ddd }
.paper { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #444 } .paper { fill: #181818 } }
</style>"""


def draw(ranking: Ranking, metrics: Sequence[str]) -> str:
    """An SVG document with a panel for every metric; accuracies are drawn in per cent."""
    panels = []
    for place, metric in enumerate(metrics):
        along, lines = series(ranking, metric)
        shares = metric.endswith(("top1", "top5"))
        scaled = {
            name: [(x, 100 * y, 100 * spread) if shares else (x, y, spread) for x, y, spread in line]
            for name, line in lines.items()
        }
        title = f"{metric}{' (%)' if shares else ''}"
        panels.append(f'<g transform="translate(0,{place * HEIGHT})">{panel(title, along, scaled)}</g>')
    size = f'width="{WIDTH}" height="{HEIGHT * len(panels)}" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}"'
    background = '<rect class="paper" width="100%" height="100%"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{STYLE}\n{background}\n' + "\n".join(panels) + "\n</svg>\n"
    )


def panel(title: str, along: str, lines: Mapping[str, Line]) -> str:
    """Axes, and every line with its points, their values and the spread over seeds."""
    at = places(list(dict.fromkeys(x for line in lines.values() for x, _, _ in line)))
    low, high, ticks = scale([y + side * s for line in lines.values() for _, y, s in line for side in (-1, 1)])
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def down(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - TOP)

    parts = [_text(LEFT, TOP - 12, title), _text((LEFT + right) / 2, HEIGHT - 8, along, anchor="middle")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{right}"/>')
        parts.append(_text(LEFT - 6, down(tick) + 4, f"{tick:g}", anchor="end"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    for x, place in at.items():
        parts.append(_text(place, bottom + 18, x, anchor="middle"))
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        spots = [(at[x], down(y)) for x, y, _ in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in sorted(spots))
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (place, y), (_, mean, spread) in zip(spots, line, strict=True):
            if spread:
                span = f"M{place:.1f} {down(mean - spread):.1f}V{down(mean + spread):.1f}"
                parts.append(f'<path d="{span}" stroke="{color}"/>')
            parts.append(f'<circle cx="{place:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
            parts.append(_text(place + 6, y - 6, f"{mean:.1f}" if mean >= 1 else f"{mean:.3g}"))
        if name:
            parts.append(_text(right, TOP - 12 + 14 * number, name, anchor="end", color=color))
    return "\n".join(parts)


def places(values: Sequence[str]) -> dict[str, float]:
    """Where each x stands, in pixels: to scale if all are numbers, else one beside the other."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or not all(map(math.isfinite, numbers)):
        numbers = [float(i) for i in range(len(values))]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    inner = WIDTH - LEFT - RIGHT - 48
    share = [(number - low) / (high - low) if high > low else 0.5 for number in numbers]
    return {value: LEFT + 24 + s * inner for value, s in zip(values, share, strict=True)}


def scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The ends of an axis that holds all values with some air, and its round ticks."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = (high - low) * 0.15 or abs(high) * 0.05 or 1.0
    low, high = low - air, high + air
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return low, high, [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str | None = None) -> str:
    fill = f' style="fill:{color}"' if color else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}>{escape(text)}</text>'
