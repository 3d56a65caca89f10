"""How far this process has come, how long each phase may take, and timers that end it when it takes longer.

The timers are the kernel's. When one fires, a handler in C writes the stacks of all Python threads, and two seconds
later a thread of the C library calls `_exit(124)`; neither needs Python's lock, which whatever hangs may hold. Where
there are no such timers (macOS), the lookout's thread is alone in watching the deadline, and a held lock escapes it.

    MAEJAX_STALL_SECONDS=600                    every phase may take ten minutes
    MAEJAX_STALL_SECONDS=step=30,compile=7200   these phases may take so long, the others as below
    MAEJAX_STALL_SECONDS=0                      no watchdog, for a debugger

A step may take five times the median of those before it, if that is longer.
"""

import ctypes
import faulthandler
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from maejax.errors import Stalled, UsageError

VARIABLE = "MAEJAX_STALL_SECONDS"
# Seconds that a phase may take; where it consists of parts (batches, files), each part.
BUDGETS = {
    "start": 900.0, "restore": 1800.0, "compile": 3600.0, "data": 600.0, "step": 120.0, "evaluate": 1800.0,
    "save": 1800.0, "finish": 1800.0,
}  # fmt: skip
SLOWER = 5  # times the median step
MARGIN = 3.0  # seconds from a deadline until the timers fire, if the lookout's thread has not done their work


class Progress:
    """Where this process is. `marks` counts phases, and waits for other processes: who has the fewest is behind.

    Attributes:
      since: when the phase, its part, or the wait began, on the monotonic clock; `waiting`: whether it is a wait.
      spent: seconds in each phase so far, waits for others not counted.
      deadline: when the current phase has taken too long, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.marks = "start", 0, 0
        self.spent: dict[str, float] = defaultdict(float)
        self.deadline = math.inf
        self.since, self.waiting = time.monotonic(), False
        self._step_since = 0.0
        self._steps: deque[float] = deque(maxlen=21)

    def mark(self, phase: str, step: int, waiting: bool, budget: float) -> None:
        """Notes that a phase, a part of it, or a wait for others begins."""
        now = time.monotonic()
        if not self.waiting:
            self.spent[self.phase] += now - self.since
        if step != self.step:
            if self._step_since:
                self._steps.append(now - self._step_since)
            self._step_since = now
        if phase == "compile":  # says nothing of the other steps
            self._step_since = 0.0
        if phase == "step" and self._steps:
            budget = max(budget, SLOWER * statistics.median(self._steps))
        self.phase, self.step, self.since, self.waiting = phase, step, now, waiting
        self.marks += 1
        self.deadline = now + budget

    def where(self) -> str:
        """In a few words, for people."""
        return place(self.step, self.phase)


def place(step: int, phase: str) -> str:
    """Where a process is, in a few words; `step` is the one under way."""
    return f"phase {phase} of step {step}" if step else f"phase {phase}"


progress = Progress()
_budgets = dict.fromkeys(BUDGETS, math.inf)  # until `arm`
_timers: "_Timers | None" = None


def phase(name: str, step: int | None = None, *, extra: float = 0.0) -> None:
    """Begins a phase, or the next part of it, which may take `extra` seconds more than others of its name.

    `step` is the one that is under way; not given, it is the same as before.
    """
    _mark(name, step, False, extra)


def _mark(name: str, step: int | None, waiting: bool, extra: float = 0.0) -> None:
    progress.mark(name, progress.step if step is None else step, waiting, _budgets[name] + extra)
    if _timers:
        _timers.set(progress.deadline - time.monotonic() + MARGIN)


@contextmanager
def waiting() -> Iterator[None]:
    """Around what waits for other processes: this one has come as far as it can alone."""
    before, waited = progress.phase, progress.waiting
    _mark(before, None, True)
    yield
    _mark(before, None, waited)


def arm() -> None:
    """Starts to watch, in the phase "start"; stacks go to stderr until `stacks_to` names a file."""
    global progress, _budgets, _timers
    _budgets = read_budgets(os.environ.get(VARIABLE, ""))
    progress = Progress()
    _timers = _Timers.make()
    stacks_to(None)
    phase("start")


def disarm() -> None:
    """Watches no longer."""
    global _timers
    if _timers:
        _timers.set(0)
        faulthandler.unregister(_timers.signal)
    _timers = None
    _budgets.update(dict.fromkeys(_budgets, math.inf))
    progress.deadline = math.inf
    stacks_to(None)


def hold_off(seconds: float) -> None:
    """Lets the timers fire in so many seconds and not before."""
    if _timers and math.isfinite(progress.deadline):
        _timers.set(seconds)


def read_budgets(text: str) -> dict[str, float]:
    """The seconds of each phase, from the environment variable; 0 is given as infinity.

    Raises:
      UsageError: it is neither a number nor NAME=SECONDS,...
    """
    found = dict(BUDGETS)
    for part in filter(None, text.split(",")):
        name, _, number = part.rpartition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", number) or (name and name not in BUDGETS):
            raise UsageError(
                f"{VARIABLE}={text} must be a number of seconds (0: no limit), or some of {', '.join(BUDGETS)} with "
                "theirs, as in step=300,compile=7200"
            )
        found |= dict.fromkeys([name] if name else BUDGETS, float(number) or math.inf)
    return found


# ---- Stacks ---------------------------------------------------------------------------------------------------------

_stacks: TextIO | None = None  # None: stderr


def stacks_to(path: Path | None) -> None:
    """Names the file that stacks are appended to, None: stderr. An old one that stayed empty is removed."""
    global _stacks
    if _stacks is not None:
        old, _stacks = _stacks, None
        if _timers:
            faulthandler.register(_timers.signal, file=2, all_threads=True)
        old.close()
        if Path(old.name).exists() and not Path(old.name).stat().st_size:
            Path(old.name).unlink()
    if path is not None:
        _stacks = path.open("a")
    if _timers:
        faulthandler.register(_timers.signal, file=_stacks or 2, all_threads=True)


def dump_stacks() -> str:
    """Writes the stacks of all threads; where to, for people."""
    faulthandler.dump_traceback(_stacks or 2, all_threads=True)
    return _stacks.name if _stacks else "above"


# ---- Timers ---------------------------------------------------------------------------------------------------------


class _Event(ctypes.Structure):
    # struct sigevent of 64-bit Linux, which has 64 bytes.
    _fields_ = (
        ("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int), ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p), ("rest", ctypes.c_char * 32),
    )  # fmt: skip


class _Time(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "seconds", "nanoseconds"))  # itimerspec


class _Timers:
    """Two timers of the kernel: the first sends a signal that faulthandler answers, the second ends the process.

    The signal goes to a thread that does nothing else: in another one it might interrupt, and so end, what hangs.
    """

    MONOTONIC, CALL_IN_THREAD, SIGNAL_TO_THREAD = 1, 2, 4

    def __init__(self, library: ctypes.CDLL, end: ctypes.c_void_p):
        self.signal = signal.SIGRTMAX
        self._set = library.timer_settime
        self._stacks, self._end = ctypes.c_void_p(), ctypes.c_void_p()
        idle = threading.Thread(target=threading.Event().wait, name="stacks", daemon=True)
        idle.start()
        for timer, event in (
            (self._stacks, _Event(0, self.signal, self.SIGNAL_TO_THREAD, idle.native_id)),
            (self._end, _Event(Stalled.exit_code, 0, self.CALL_IN_THREAD, end)),
        ):
            if library.timer_create(self.MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
                raise OSError(ctypes.get_errno(), "timer_create")

    _made: "_Timers | None" = None

    @classmethod
    def make(cls) -> "_Timers | None":
        """This process's timers; None where there are none."""
        if cls._made is None and sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                # glibc had them in a library of their own before 2.34.
                library = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
                end = ctypes.cast(libc._exit, ctypes.c_void_p)
                cls._made = cls(library, end)
            except (OSError, AttributeError):
                return None
        return cls._made

    def set(self, seconds: float) -> None:
        """Fires in so many seconds, stacks a little before the end; 0 or infinity: not at all."""
        never = not 0 < seconds < math.inf
        for timer, at in ((self._stacks, max(seconds - 0.6 * MARGIN, 0.001)), (self._end, seconds)):
            at = 0.0 if never else at
            self._set(timer, 0, ctypes.byref(_Time(0, 0, int(at), int(at % 1 * 1e9))), None)
