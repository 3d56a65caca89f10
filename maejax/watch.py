"""A run drawn with characters: curves in braille, 2x4 dots each; pictures in half blocks, two pixels each.

A frame fits the terminal, from 80x24 up. Where there are no colors (a pipe, a dumb terminal) pictures are grey shades.
"""

import math
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text

from maejax import config as configs
from maejax.metrics import duration, shown
from maejax.record import Points, Record, read
from maejax.visualize import TITLES, tiles

CURVES = (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "|g|"), ("perf/img_per_sec", "img/s"))
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
SHADES = " .:-=+*#%@"  # from dark to light, where there are no colors
SMALLEST = (24, 8)  # of a picture's images: columns and lines


def once(run: Path) -> None:
    """Prints one frame."""
    console = Console(highlight=False)
    height = console.height if console.is_terminal else 24
    console.print(frame(read(run), console.width, height, colors=console.color_system is not None), end="")


def follow(run: Path, every: float) -> None:
    """Draws frames until Ctrl-C; the last one stays."""
    console = Console(highlight=False)

    def drawn() -> Text:
        return frame(read(run), console.width, console.height, colors=console.color_system is not None)

    text = drawn()
    try:
        with Live(text, console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(text, refresh=True)
                time.sleep(every)
                text = drawn()
    except KeyboardInterrupt:
        console.print(text, end="")


def frame(record: Record, width: int, height: int, *, colors: bool, now: datetime | None = None) -> Text:
    """Everything, in at most `height` - 1 lines of at most `width` characters."""
    half = max(8, (width - 2) // 2)
    lines = [*heading(record, width, now or datetime.now())]
    picture_lines = 0 if not record.pictures else max(SMALLEST[1], (height - 6) // 2)
    rows = max(1, (height - len(lines) - picture_lines - 2) // 2 - 1)  # of braille, of each of two rows of curves
    for left, right in (CURVES[:2], CURVES[2:]):
        pair = [
            [Text(_cut(_label(title, record.metrics.get(metric, [])), half), style="bold"),
             *(Text(line, style="cyan") for line in braille(record.metrics.get(metric, []), half, rows))]
            for metric, title in (left, right)
        ]  # fmt: skip
        for a, b in zip(*pair):
            a.truncate(half, pad=True)
            lines.append(Text.assemble(a, "  ", b))
    lines += picture(record, width, height - 1 - len(lines), colors=colors)
    text = Text("\n").join(lines[: height - 1]) + Text("\n")
    text.no_wrap, text.overflow = True, "crop"
    return text


def heading(record: Record, width: int, now: datetime) -> list[Text]:
    """Where the run stands: its name, its step and how long it will take; below, its newest evaluations."""
    total, step = record.total_steps, record.step
    parts = [record.folder.absolute().name, f"step {step}" + (f"/{total} {100 * step / total:.0f}%" if total else "")]
    last = record.starts[-1] if record.starts else None
    speed = dict(record.metrics.get("perf/step_time", []))
    if last is None:
        parts.append("not started yet")
    elif last.end:
        parts.append(last.end if last.end == "finished" else f"ended: {last.end}")
    else:
        if total and speed:
            parts.append(f"eta {duration((total - step) * list(speed.values())[-1])}")
        parts.append(f"last heard of {duration(max(0.0, (now - last.last_time).total_seconds()))} ago")
    if record.bad_images:
        parts.append(f"bad {record.bad_images.total()}")
    found = "  ".join(f"{metric} {shown(metric, points[-1][1])}" for metric, points in record.evals.items())
    lines = [Text(_cut("  ".join(parts), width), style="bold reverse" if last and not last.end else "bold")]
    return [*lines, Text(_cut(found, width))] if found else lines


def braille(points: Points, columns: int, rows: int) -> list[str]:
    """A curve as lines of braille, from its lowest to its highest value; the dots of a column are joined."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    cells = np.zeros((rows, columns), np.int64)
    if finite:
        (first, _), (last, _) = finite[0], finite[-1]
        low, high = min(y for _, y in finite), max(y for _, y in finite)
        across, down = 2 * columns - 1, 4 * rows - 1
        places = [
            (
                round(across * (x - first) / (last - first)) if last > first else 0,
                round(down * (high - y) / (high - low)) if high > low else down // 2,
            )
            for x, y in finite
        ]
        for (x, y), (next_x, next_y) in zip(places, [*places[1:], places[-1]]):
            for i in range(length := max(abs(next_x - x), abs(next_y - y), 1)):
                column, row = round(x + i * (next_x - x) / length), round(y + i * (next_y - y) / length)
                cells[row // 4, column // 2] |= DOTS[row % 4][column % 2]
        column, row = places[-1]
        cells[row // 4, column // 2] |= DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + int(cell)) for cell in line) for line in cells]


def picture(record: Record, width: int, height: int, *, colors: bool) -> list[Text]:
    """The newest reconstruction: as many images as fit, each original | masked | reconstruction, and a caption."""
    size = configs.pair(record.config.image_size)
    read_back = ((step, _tiles(path, size)) for step, path in reversed(record.pictures))
    step, images = next(((step, images) for step, images in read_back if images is not None), (0, None))
    if images is None:
        return []
    lines = height - 1
    tile_width = min(round(2 * lines * size[1] / size[0]), (width - 2) // 3)
    lines = min(lines, max(1, round(tile_width * size[0] / size[1] / 2)))
    if lines < 1 or tile_width < 4:
        return []
    groups = max(1, min(len(images), (width + 2) // (3 * tile_width + 4)))
    rows = [Text() for _ in range(lines)]
    for index, image in enumerate(images[:groups].reshape(-1, *images.shape[2:])):
        small = np.asarray(Image.fromarray(image).resize((tile_width, 2 * lines), Image.Resampling.BOX))
        gap = "" if index == 0 else " " if index % 3 else "  "
        for row, line in zip(rows, half_blocks(small) if colors else shades(small)):
            row.append(gap).append_text(line)
    return [*rows, Text(_cut(f"{' | '.join(TITLES[:3])}, step {step}", width), style="dim")]


def _tiles(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """A picture's images; None while it is being written."""
    try:
        with Image.open(path) as file:
            return tiles(np.asarray(file.convert("RGB")), size)[:, :3]
    except (OSError, ValueError):
        return None


def half_blocks(image: np.ndarray) -> list[Text]:
    """Two rows of pixels a line: the upper one as the color of a block, the lower one as what is behind it."""

    def block(upper: np.ndarray, lower: np.ndarray) -> tuple[str, Style]:
        return "▀", Style(color=Color.from_rgb(*map(int, upper)), bgcolor=Color.from_rgb(*map(int, lower)))

    return [Text.assemble(*(block(*pair) for pair in zip(*rows))) for rows in zip(image[::2], image[1::2])]


def shades(image: np.ndarray) -> list[Text]:
    """Two rows of pixels a line, as a character that is as bright."""
    grey = image.astype(np.float32).mean(-1)
    levels = ((grey[::2] + grey[1::2]) / 2 * (len(SHADES) - 1) / 255).round().astype(int)
    return [Text("".join(SHADES[level] for level in line)) for line in levels]


def _label(title: str, points: Points) -> str:
    if not points:
        return f"{title}  nothing yet"
    values = [y for _, y in points if math.isfinite(y)] or [math.nan]
    return f"{title}  {_number(points[-1][1])}   ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
