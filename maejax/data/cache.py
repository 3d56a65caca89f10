"""`data.cache=N`: every image of a small source decoded once and kept in memory, its shorter side N pixels at most.

What is kept is what `decode` and `shrink` give, uint8 and not compressed again: crops come from the smaller image, as
they do from a pack of `--size=N`. All images lie in one file in memory, which Grain's worker processes map instead of
copying. Several processes of one machine have one each.
"""

import contextlib
import os
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from maejax.data.decode import CAUSES, BadImage, decode, header
from maejax.data.sources import Source
from maejax.data.transforms import LONGEST, read_record, shrink
from maejax.errors import UsageError

SHARE = 0.8  # of the memory that is free, at most
LOOKED_AT = 1000  # records whose size is looked up before a run starts


class InMemory:
    """A source, its images decoded. It is filled when it is made; bad images are kept as what they are.

    Raises:
      UsageError: they do not fit into SHARE of the free memory.
    """

    def __init__(self, source: Source, *, side: int, channels: int, max_pixels: int):
        self.num_classes, self._source = source.num_classes, source
        self._decode: dict[str, Any] = {"channels": channels, "max_pixels": max_pixels}
        self._side = side
        self._starts = np.zeros(len(source), np.int64)
        self._shapes = np.zeros((len(source), 2), np.int32)
        self._causes = np.full(len(source), -1, np.int8)
        self._labels = np.full(len(source), -1, np.int32)
        self._file, self._path = _memory_file(self)
        self._end, self._lock, self._most = 0, threading.Lock(), int(SHARE * free_memory())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(self._keep, range(len(source))):
                pass
        self._map()

    def _keep(self, index: int) -> None:
        try:
            record = read_record(self._source, index)
            pixels = np.ascontiguousarray(shrink(decode(record["image"], **self._decode), self._side))
        except BadImage as error:
            self._causes[index] = CAUSES.index(error.cause)
            return
        with self._lock:
            start, self._end = self._end, self._end + pixels.nbytes
        if self._end > self._most:
            raise UsageError(_too_large(self._side, len(self._source), self._end, self._most))
        os.pwrite(self._file, pixels.data, start)
        self._starts[index], self._shapes[index] = start, pixels.shape[:2]
        self._labels[index] = record.get("label", -1)

    def _map(self) -> None:
        self._pixels = np.asarray(np.memmap(self._path, np.uint8, "r")) if self._end else np.zeros(0, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """Where the pixels are, not the pixels: the file lives as long as the process that made it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_pixels", "_file", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._causes[index] >= 0:
            raise BadImage(CAUSES[self._causes[index]])
        start, (h, w), c = self._starts[index], self._shapes[index], self._decode["channels"]
        record: dict[str, Any] = {"image": self._pixels[start : start + int(h) * int(w) * c].reshape(h, w, c)}
        return record if self.num_classes is None else record | {"label": int(self._labels[index])}

    def name(self, index: int) -> str:
        """The source's."""
        return self._source.name(index)

    def fingerprint(self) -> str:
        """The source's."""
        return self._source.fingerprint()


def check_memory(source: Source, *, side: int, channels: int) -> str:
    """A line on what the cache will take, by the headers of LOOKED_AT images; UsageError if that is too much."""
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(np.int64)):
        with contextlib.suppress(BadImage):
            image = read_record(source, int(index))["image"]
            h, w = image.shape[:2] if isinstance(image, np.ndarray) else header(image)[1:]
            factor = min(side / min(h, w), 1)
            sizes.append(min(h, w) * factor * min(max(h, w) * factor, LONGEST * side) * channels)
    needed, most = int(np.mean(sizes or [0]) * len(source)), int(SHARE * free_memory())
    if needed > most:
        raise UsageError(_too_large(side, len(source), needed, most))
    return f"cache     {len(source):,} images, shorter side at most {side}: about {needed / 1e6:,.0f} MB of memory"


def _too_large(side: int, images: int, needed: int, most: int) -> str:
    return (
        f"data.cache={side} needs {needed / 1e9:,.2f} GB or more for {images:,} images, and {most / 1e9:,.2f} GB is "
        f"{SHARE:.0%} of what is free; choose a smaller side, or maejax data pack"
    )


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or those of its control group if these are fewer."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - taken, 0))
    return free


def _memory_file(owner: object) -> tuple[int, str]:
    """A file in memory that lives as long as its owner, and the path by which other processes open it.

    Where the system has no such files, a temporary one.
    """
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("maejax-cache")
        weakref.finalize(owner, os.close, number)
        return number, f"/proc/{os.getpid()}/fd/{number}"
    number, path = tempfile.mkstemp(prefix="maejax-cache-")
    weakref.finalize(owner, os.close, number)
    weakref.finalize(owner, os.unlink, path)
    return number, path
