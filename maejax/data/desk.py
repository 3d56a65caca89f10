"""What is being read at this moment, so that a record that hangs or kills its reader can be named.

Each thread puts a record's number on the desk while it reads and decodes it. A worker's desk is a file that its parent
has mapped, too: neither Python's lock nor the worker's death keeps the parent from looking.
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maejax.redact import masked

PLACES = 255  # threads of one process that are seen at once; more are not
_numbers = np.zeros((1 + PLACES, 2), np.int64)  # of this process: its id, and a row for each place
_free = list(range(1, 1 + PLACES))


def make_desk_file(workers: int) -> str:
    """A file for that many desks; whoever asks for it deletes it."""
    number, name = tempfile.mkstemp(prefix="maejax-desks-")
    os.truncate(number, workers * _numbers.nbytes)
    os.close(number)
    return name


def make_desks(workers: int, file: str | None) -> np.ndarray:
    """Desks int64 (workers 1+PLACES 2): [:, 0, 0] process ids, then (record + 1 or 0, how often a place was taken).

    Without a file, the one desk of this process.
    """
    if file is None:
        return _numbers[None]
    return np.memmap(file, np.int64, "r+", shape=(workers, 1 + PLACES, 2))


def sit_down(file: str, worker: int, workers: int) -> None:
    """Makes this process, a worker, use its desk in the file."""
    global _numbers
    _numbers = make_desks(workers, file)[worker]
    _numbers[0, 0] = os.getpid()


@contextlib.contextmanager
def on_the_desk(record: int) -> Iterator[None]:
    """Inside the `with` block this thread is at that record."""
    try:
        place = _free.pop()
    except IndexError:
        yield
        return
    _numbers[place, 1] += 1
    _numbers[place, 0] = record + 1
    try:
        yield
    finally:
        _numbers[place, 0] = 0
        _free.append(place)


def watch(desks: np.ndarray, seconds: float, stop: threading.Event, hung: Callable[[int, int], None]) -> None:
    """Calls `hung(worker, record)` for each record that stays on a desk for so long; returns once `stop` is set.

    Looks are counted, not the clock: while all processes are stopped together, no time passes.
    """
    pause = min(0.25, seconds / 8)
    seen, looks = desks[:, 1:].copy(), np.zeros((desks.shape[0], PLACES))
    while not stop.wait(pause):
        now = desks[:, 1:].copy()
        looks = np.where((now == seen).all(-1) & (now[..., 0] > 0), looks + 1, 0)
        seen = now
        for worker, place in np.argwhere(looks * pause >= seconds):
            hung(int(worker), int(now[worker, place, 0]) - 1)
            looks[worker, place] = 0


class Unusable:
    """Records that hung or killed their reader, with a cause each; a file keeps them, so that a restart knows them."""

    def __init__(self, file: Path | None = None):
        self.causes: dict[int, str] = {}
        self._file = file
        for line in file.read_text().splitlines() if file and file.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # a line cut off by a kill
                entry = json.loads(line)
                self.causes[int(entry["record"])] = str(entry["cause"])

    def add(self, record: int, name: str, cause: str) -> None:
        """From now on this record is a bad image."""
        self.causes[record] = cause
        if self._file:
            with self._file.open("a") as file:  # one short write, so that processes do not mix their lines
                file.write(json.dumps({"record": record, "name": masked(name), "cause": cause}) + "\n")
