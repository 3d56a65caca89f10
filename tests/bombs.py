"""Small files that promise gigabytes and large ones that hold a dot; what decoding one of them costs."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from odd_images import chunk, encoded, noise, npy_header, photo, png, segment

ROOT = Path(__file__).parents[1]


def jpeg_with(path: Path, marker: int, *, before: bytes) -> None:
    """A JPEG of 500 MB, nearly all of them in 8,000 segments before one of its own; on disk they are holes."""
    data = encoded(photo(), "JPEG")
    at = data.index(before)
    with path.open("wb") as file:
        file.write(data[:at])
        for _ in range(8_000):
            file.write(segment(marker, bytes(65_533))[:4])
            file.seek(65_533, os.SEEK_CUR)
        file.write(data[at:])


def png_with(path: Path, kind: bytes, body: bytes, hole: int = 0) -> None:
    """A good PNG with a chunk before its pixels; `hole` bytes of zeros are its last ones."""
    data = png(8, 8, chunk(kind, body), pixels=bytes(8 * 25))
    if hole:
        at = data.index(kind) - 4
        data = data[:at] + (len(body) + hole).to_bytes(4, "big") + data[at + 4 :]
    with path.open("wb") as file:
        file.write(data[: (end := data.index(kind) + 4 + len(body))])
        file.seek(hole, os.SEEK_CUR)
        file.write(data[end:])


def webp_canvas(path: Path) -> None:
    """An animation whose canvas has 2^48 pixels."""
    data = bytearray(encoded(noise(8, 8), "WEBP", save_all=True, append_images=[]))
    extended = b"VP8X\x0a\0\0\0" + b"\x02\0\0\0" + b"\xff\xff\xff" * 2
    riff = extended + data[12:]
    path.write_bytes(b"RIFF" + (4 + len(riff)).to_bytes(4, "little") + b"WEBP" + riff)


SWOLLEN = zlib.compress(bytes(400_000_000), 9)
Make = Callable[[Path], object]
BOMBS: dict[str, tuple[str, Make]] = {  # each with its cause
    "30k.png": ("too_large", lambda path: path.write_bytes(png(30_000, 30_000, pixels=bytes(54_000_000)))),
    "100k.png": ("too_large", lambda path: path.write_bytes(png(100_000, 100_000))),
    "comment.jpg": ("too_large", lambda path: jpeg_with(path, 0xFE, before=b"\xff\xdb")),
    "comment-after-size.jpg": ("too_large", lambda path: jpeg_with(path, 0xFE, before=b"\xff\xda")),
    "application.jpg": ("too_large", lambda path: jpeg_with(path, 0xE5, before=b"\xff\xdb")),
    "icc-nested.png": ("corrupt", lambda path: png_with(path, b"iCCP", b"x\0\0" + SWOLLEN)),
    "text-nested.png": ("corrupt", lambda path: png_with(path, b"zTXt", b"x\0\0" + SWOLLEN)),
    "text.png": ("too_large", lambda path: png_with(path, b"tEXt", b"x\0", hole=500_000_000)),
    "canvas.webp": ("too_large", webp_canvas),
    "header.npy": ("truncated", lambda path: path.write_bytes(npy_header("(900000, 900000, 3)"))),
}  # fmt: skip

MEASURE = """
import json, resource, sys, time
import numpy as np
from maejax.data.sources import make_source
from maejax.data.transforms import LoadImage, read_faults
folder, count = sys.argv[1], int(sys.argv[2])
load = LoadImage(source=make_source(folder, split=""), channels=3, max_pixels=100_000_000)
load(count - 1, np.random.default_rng(0))  # a good one: libraries are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(count):
    start = time.process_time()
    faults = read_faults(load(i, Chosen())["faults"]) if i < count - 1 else []
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"name": load.source.name(i), "cause": faults[0][1] if faults else "", "mb": (rss - before) / 1024,
                      "seconds": time.process_time() - start}), flush=True)
"""
GOOD_LAST = "class Chosen:\n    def integers(self, count): return count - 1\n"


def measure(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Makes bombs and reads them in a process of their own: cause, memory beyond the start, seconds of each."""
    for name in names:
        BOMBS[name][1](folder / name)
    (folder / "zz-good.png").write_bytes(encoded(noise(8, 8)))
    command = [sys.executable, "-c", GOOD_LAST + MEASURE, str(folder), str(len(names) + 1)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()][:-1]
    for result in results:  # the promise: refused by the header, with at most 200 MB and a second each
        assert result["cause"] == BOMBS[result["name"]][0], result
        assert result["mb"] <= 200 and result["seconds"] <= 1, result
    return results
