"""Faults on demand, so that tests can break a run at a place that has a name.

    MAEJAX_FAULT=POINT:PROCESS:TIME:ACTION,...

At the TIME-th passage (from 1; * for each) of a point by a process (its number, or *), the action happens: a signal
(`kill`, `term`, `int`, `stop`, `abort`, `segv`), `sleep=SECONDS`, `hold=SECONDS` (asleep without letting go of Python's
lock), or `raise=NAME`, an errno such as ENOSPC for an OSError, anything else for a RuntimeError that says so. A run
without the variable pays one comparison.
"""

import ctypes
import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "MAEJAX_FAULT"
SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "int": "SIGINT", "stop": "SIGSTOP", "abort": "SIGABRT"}
process = 0  # this process's number; `distributed.join` sets it
_wanted = [tuple(text.split(":")) for text in os.environ.get(VARIABLE, "").split(",") if text]
_passages: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Does nothing, unless the environment asks for a fault at the point of this name."""
    if not _wanted:
        return
    _passages[name] += 1
    for point, who, when, action in _wanted:
        if point == name and who in ("*", str(process)) and when in ("*", str(_passages[name])):
            _act(action, name)


def _act(action: str, name: str) -> None:
    kind, _, value = action.partition("=")
    if kind in SIGNALS:
        os.kill(os.getpid(), getattr(signal, SIGNALS[kind]))
    elif kind == "segv":
        ctypes.string_at(0)
    elif kind == "sleep":
        time.sleep(float(value))
    elif kind == "hold":
        ctypes.PyDLL(None).usleep(int(float(value) * 1e6))
    elif kind == "raise":
        number = getattr(errno, value, None)
        raise RuntimeError(f"{value} at {name}") if number is None else OSError(number, os.strerror(number), name)
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
