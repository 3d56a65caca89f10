"""Worker processes that may die or hang: the stream of batches goes on from the same step, in the same order.

A batch is a function of its step, so workers are replaced by beginning again where the run is. A record that is on a
desk longer than the deadline costs its worker the life and counts as bad from then on, cause "timeout"; so does one
that was under way twice when a worker died, cause "crashed" (once may be chance: memory ran out elsewhere).

Without workers, records are read in threads, which nothing can end: there the run ends with exit code 124 and the
record's name, and the next start treats it as bad.
"""

import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from maejax.data.desk import Unusable, make_desk_file, make_desks, sit_down, watch
from maejax.errors import WorkersDied

Say = Callable[[str], None]
Begin = Callable[[int, int], None]  # what a worker does first, given its number and how many there are
# How Grain is asked for the batches from a step on: make(step, causes of the unusable records, begin).
Make = Callable[[int, Mapping[int, str], Begin | None], Any]
GRACE_SECONDS = 30  # that a worker goes on after SIGTERM
MOST_DEATHS = 3  # in a row without a single batch between them
STALLED = 124  # exit code


class Stream:
    """Batches from `first_step` on, without end; `close` ends the workers."""

    def __init__(
        self,
        make: Make,
        *,
        name_of: Callable[[int], str],
        first_step: int,
        workers: int,
        seconds: float,
        unusable: Unusable | None = None,
        say: Say | None = None,
    ):
        self._make, self._name_of, self._step, self._workers = make, name_of, first_step, workers
        self._seconds, self._unusable, self._say = seconds, unusable or Unusable(), say or _to_stderr
        self._batches: Any = None
        self._suspects: set[int] = set()  # records that were under way when a worker died
        self._deaths = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            if self._batches is None:
                self._begin()
            try:
                batch = next(self._batches)
            except Exception as error:  # of Grain, if a worker has died; else of whoever failed in it
                if "terminated unexpectedly" not in str(error):
                    raise
                gone = [worker for worker, pid in enumerate(self._desks[:, 0, 0]) if pid and not _is_alive(int(pid))]
                self._replace(gone, error)
                continue
            self._step, self._deaths = self._step + 1, 0
            return batch

    def _begin(self) -> None:
        file, begin = None, None
        if self._workers:
            file = make_desk_file(self._workers)
            begin = functools.partial(_begin_work, file)
        self._desks = make_desks(self._workers, file)
        self._stop = threading.Event()
        self._clear = weakref.finalize(self, _clear, self._stop, file)
        hung = weakref.WeakMethod(self._hung)  # or the watching thread would keep this stream alive
        arguments = self._desks, self._seconds, self._stop, lambda *at: (method := hung()) and method(*at)
        threading.Thread(target=watch, args=arguments, daemon=True, name="records").start()
        self._batches = iter(self._make(self._step, dict(self._unusable.causes), begin))

    def _replace(self, gone: list[int], error: Exception) -> None:
        """Notes what the dead were at and ends the others, so that the next batch is asked of new ones."""
        at = [int(record) - 1 for worker in gone for record in self._desks[worker, 1:, 0] if record]
        self._deaths += 1
        for record in at:
            if record in self._suspects and record not in self._unusable.causes:
                self._unusable.add(record, self._name_of(record), "crashed")
                self._deaths = 0
        new = [record for record in at if record not in self._unusable.causes]
        self._suspects.update(new)
        code = re.search(r"exit code (-?\d+)", str(error))
        how = _ending(int(code[1])) if code else "ended"
        while_at = f" while it read {self._name_of(new[0])} (record {new[0]})" if new else ""
        if self._deaths >= MOST_DEATHS:
            raise WorkersDied(
                f"workers that load images died {MOST_DEATHS} times in a row before step {self._step + 1} (the last "
                f"{how}{while_at}); if memory ran out, set --config.data.workers to fewer, or to 0 to load in threads"
            ) from error
        if not any(record in self._unusable.causes for record in at):
            self._say(f"warning: a worker that loads images {how}{while_at}; replaced")
        elif at[0] in self._suspects:
            self._say(f"warning: {self._name_of(at[0])} (record {at[0]}) ended its worker twice; counted as bad")
        self.close()

    def _hung(self, worker: int, record: int) -> None:
        """Called by the watching thread."""
        what = f"warning: {self._name_of(record)} (record {record}) took more than {self._seconds:g} s to read"
        if record not in self._unusable.causes:
            self._unusable.add(record, self._name_of(record), "timeout")
        if not self._workers:
            self._say(f"{what}; the run ends, and counts it as bad when it is started again")
            sys.stdout.flush()
            os._exit(STALLED)
        self._say(f"{what}; counted as bad, its worker is replaced")
        for child in multiprocessing.active_children():  # and nobody who has got a dead one's number since
            if child.pid == self._desks[worker, 0, 0]:
                child.kill()

    def close(self) -> None:
        """Ends the workers: each stops after the batch that it is at. To kill them would leave shared memory behind."""
        if self._batches is None:
            return
        if not self._workers:  # whatever hangs from now on harms nobody
            self._clear()
        self._batches.close()
        self._clear()
        self._batches = None


def _clear(stop: threading.Event, file: str | None) -> None:
    stop.set()
    if file:
        os.unlink(file)


def _begin_work(file: str, worker: int, workers: int) -> None:
    """What each worker does first.

    It leaves when its parent has gone, and only then. Ctrl-C and a scheduler's SIGTERM reach workers too, while the
    run still needs batches for the step that it saves after; and a parent that is killed cannot tell them to stop.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE_SECONDS, os._exit, (1,)).start())
    sit_down(file, worker, workers)
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _ending(code: int) -> str:
    """An exit code for people."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (did memory run out?)" if name == "SIGKILL" else "")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
