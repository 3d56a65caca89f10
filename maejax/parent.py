"""Processes that start others of this program, and those others, which never outlive them."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

VARIABLE = "MAEJAX_PARENT"
SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child that shall die with it."""
    return {**os.environ, **(more or {}), VARIABLE: str(os.getpid())}


_parent: int | None = None


def follow_parent() -> None:
    """Asks the kernel to end this process when the one that started it dies, however that may be."""
    global _parent
    if VARIABLE not in os.environ:
        return
    _parent = int(os.environ.pop(VARIABLE))  # this process's children have it for a parent, or none
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if parent_has_gone():
        os._exit(1)


def parent_has_gone() -> bool:
    """Whether the process that started this one to die with it is no longer there."""
    return _parent is not None and os.getppid() != _parent
