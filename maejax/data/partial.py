"""Of a JPEG, only what one crop needs: `data.resize="fast"`.

Rows below the crop are not decoded: a copy of the header says that the image ends there, which baseline JPEG allows
at any row of blocks, and the rows above come out as ever, bit for bit. Where a half, a quarter or an eighth of the
crop's sides still is at least the wanted size, the inverse DCT makes no more than that: only then pixels differ.
"""

from collections.abc import Callable

import numpy as np
import simplejpeg

from maejax.data.decode import EXTRANEOUS, TURNS, decode, orientation
from maejax.data.resize import Box

BLOCKS_BELOW = 16  # rows decoded below the crop, for what smoothing of colors takes from there
END = b"\xff\xd9"
PADDING = 64  # bytes that may follow the end


def decode_part(
    image: bytes | np.ndarray,
    draw: Callable[[int, int], tuple[int, int, int, int]],
    size: tuple[int, int],
    *,
    channels: int,
    max_pixels: int,
) -> tuple[np.ndarray, Box]:
    """(pixels, box in them) of an image, of which `draw(height, width)` says what is wanted, to be resized to `size`.

    Boxes are (top, left, height, width), in whole pixels as they are drawn; see `resize_box`.

    What is not a plain upright JPEG is decoded whole, as is one that is cut off, or damaged where libjpeg sees it; it
    does not look below the crop.

    Raises:
      BadImage: as `decode` does.
    """
    plain = _plain(image, channels, max_pixels)
    if plain is None:
        pixels = decode(image, channels=channels, max_pixels=max_pixels)
        return pixels, draw(pixels.shape[0], pixels.shape[1])
    assert isinstance(image, bytes)
    height, width, at = plain
    box = draw(height, width)
    part = _decoded(image, box, size, height, width, at, channels)
    return part or (decode(image, channels=channels, max_pixels=max_pixels), box)


def _plain(image: bytes | np.ndarray, channels: int, max_pixels: int) -> tuple[int, int, int] | None:
    """Height, width and where in the header the height stands, of a JPEG that can be decoded in part."""
    if not isinstance(image, bytes) or image[:3] != b"\xff\xd8\xff" or channels not in (1, 3):
        return None
    if END not in image[-PADDING:]:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    if height * width > max_pixels or colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    if b"Exif\0\0" in image[:65536] and orientation(image) in TURNS:
        return None
    at = _frame(image)
    return None if at is None else (height, width, at)


def _frame(image: bytes) -> int | None:
    """Where the height stands in the frame header of a baseline JPEG; None for the progressive and others."""
    at = 2
    while at + 9 < len(image) and image[at] == 0xFF:
        kind = image[at + 1]
        if kind in (0xC0, 0xC1):
            return at + 5
        if kind == 0xFF:  # padding between segments
            at += 1
        elif kind in (0xDA, 0xC2) or kind > 0xC4 and kind < 0xD0 and kind not in (0xC8, 0xCC):
            return None
        else:
            at += 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    return None


def _decoded(
    image: bytes,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    height: int,
    width: int,
    at: int,
    channels: int,
) -> tuple[np.ndarray, Box] | None:
    """(pixels, box in them); None if libjpeg complains."""
    top, left, h, w = box
    rows = min(-(-(top + h) // 16) * 16 + BLOCKS_BELOW, height)
    short = image if rows == height else image[:at] + rows.to_bytes(2, "big") + image[at + 2 :]
    factor = next(f for f in (8, 4, 2, 1) if f == 1 or min(h / size[0], w / size[1]) >= f)
    pixels = np.empty((-(-rows // factor), -(-width // factor), channels), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            short, "GRAY" if channels == 1 else "RGB", buffer=pixels,
            min_height=pixels.shape[0], min_width=pixels.shape[1], min_factor=factor,
        )  # fmt: skip
    except ValueError as error:
        if rows == height or not EXTRANEOUS.search(str(error)):  # which all of the rows below are, to libjpeg
            return None
    return pixels, (top / factor, left / factor, h / factor, w / factor)
