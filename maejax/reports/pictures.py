"""A slider over reconstructions: what a network made of the same hidden patches at one step after the other."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from maejax.reports.page import Element, tag
from maejax.visualize import TITLES, tiles

MOST_PICTURES = 24  # in one page
WIDEST = 140  # pixels of an image: eight of them fill the page
SMALL = 64  # pixels of an image that is shown pixel by pixel
Picture = tuple[str, Path, tuple[int, int]]  # the words that it is found by, its file, height and width of its images
Sheet = np.ndarray  # uint8 (rows columns h w 3): what `visualize.tiles` gives


def slider(pictures: Sequence[Picture], *, what: str) -> Element | None:
    """Rows of images: the original, what the network was shown, and what it made of it, which the slider changes.

    Args:
      pictures: of `visualize.grid`, in the slider's order.
      what: what the words are, as in "step".

    Pictures that cannot be read, because they are being written just now, are left out; None if none is left.
    """
    sheets = [(words, _read(path, size)) for words, path, size in evenly(pictures, MOST_PICTURES)]
    read = [(words, sheet) for words, sheet in sheets if sheet is not None]
    if not read:
        return None
    # What all of them show, the same images and masks, is there once.
    fixed = next(n for n in (2, 1, 0) if len({sheet[:, :n].tobytes() for _, sheet in read}) == 1)
    last = len(read) - 1
    newest = read[last][1]
    frames = [
        tag(
            "div",
            (_strip(TITLES[column], sheet[:, column], words) for column in range(fixed, sheet.shape[1])),
            class_="frame",
            data_words=words,
            hidden=None if index == last else "hidden",
        )
        for index, (words, sheet) in enumerate(read)
    ]
    control = tag(
        "label",
        tag("span", what),
        tag("input", type="range", min=0, max=last, value=last, step=1, aria_valuetext=read[last][0]),
        tag("output", read[last][0]),
        class_="control",
    )
    return tag(
        "div",
        control if last else None,
        (_strip(TITLES[column], newest[:, column]) for column in range(fixed)),
        frames,
        class_="pictures",
    )


def evenly(items: Sequence[Picture], most: int) -> list[Picture]:
    """At most `most` of them, evenly spaced, both ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _read(path: Path, size: tuple[int, int]) -> Sheet | None:
    try:
        with Image.open(path) as picture:
            sheet = tiles(np.asarray(picture.convert("RGB")), size)
    except (OSError, ValueError):
        return None
    zoom = sheet.shape[2] // size[0]  # the browser enlarges as well
    return sheet[:, :, ::zoom, ::zoom] if 3 <= sheet.shape[1] <= len(TITLES) else None


def _strip(title: str, images: np.ndarray, words: str = "") -> Element:
    """A column of the picture as a row of the page, (b h w 3)."""
    label = f"{len(images)} images: {title}{', ' + words if words else ''}"
    small = "small" if images.shape[2] <= SMALL else None  # enlarged as it is, pixel by pixel
    row = tag("div", (tag("img", src=data_url(i), alt="", class_=small) for i in images), role="img", aria_label=label)
    return tag("div", tag("span", title), row, class_="strip")


def data_url(image: np.ndarray) -> str:
    """An image (h w 3) inside its address: a small one to the pixel, a larger one as JPEG."""
    picture = Image.fromarray(image)
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    format, options = ("png", {}) if picture.width <= SMALL else ("jpeg", {"quality": 85})
    picture.save(buffer, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
