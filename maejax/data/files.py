"""Image files of a folder: found, and read no further than an image of their size can reach.

A folder is what strangers have filled: with pipes, devices, links in circles, and files of a gigabyte that hold a dot.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from maejax.data.decode import BadImage, header

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
LARGE = 2**26  # bytes that are read without a question
HEADER = 2**20  # bytes in which a larger file must say what it holds
PER_PIXEL = 16  # bytes that no format needs for a pixel, and some come near: RGBA of 16 bits, not compressed
# Formats that may say it anywhere, or have any number of channels.
UNBOUNDED = (b"II*\0", b"MM\0*", b"\x93NUMPY")


def image_files(folder: Path, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths below `folder`, with "/" between their parts; a link back to a folder `above` is not followed.

    What a name that ends like an image's stands for is a file or a link to nowhere; pipes and devices are left out.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:  # a subfolder that may not be read
        return
    for entry in entries:
        if entry.is_dir():
            yield from image_files(Path(entry.path), f"{below}{entry.name}/", (*above, real))
        elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or not os.path.exists(entry.path)):
            yield below + entry.name


def read_image_file(path: Path) -> bytes:
    """The file's bytes.

    Raises:
      BadImage: "unreadable" for what is no file, "too_large" for one that is far larger than its header says.
      OSError: as always.
    """
    # Not blocking: to open a pipe that nobody writes to would take forever.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb") as file:
        there = os.fstat(number)
        if not stat.S_ISREG(there.st_mode):
            raise BadImage("unreadable", "not a regular file")
        if there.st_size > LARGE:
            first = file.read(HEADER)
            if not first.startswith(UNBOUNDED):
                _check_proportion(first, there.st_size)
            file.seek(0)
        return file.read()


def _check_proportion(first: bytes, length: int) -> None:
    try:
        _, height, width = header(first)
    except BadImage as error:
        raise BadImage("too_large", f"{length:,} bytes, and no image size in the first {HEADER:,}") from error
    if length > LARGE + PER_PIXEL * height * width:
        raise BadImage("too_large", f"{length:,} bytes for {width}x{height} pixels")
