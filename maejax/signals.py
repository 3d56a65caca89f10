"""SIGTERM and SIGINT: what they ask for in each phase of a run, and that nobody else has taken them."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ONCE = 0.5  # seconds within which signals are one request
USUAL = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)


class Interruption:
    """Remembers that SIGTERM or SIGINT came; a second one ends the process at once, the last checkpoint intact.

    Attributes:
      begun: whether there is something to save: a step has been done.
      asked: the signal that asks the loop to stop. Python's handler sets it, in the loop's own thread, so that the step
        under way is the last; the lookout, which hears of it a moment later, answers for what else a signal means.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        self.asked: str | None = None
        self.begun = False
        self._heard = 0.0
        self._wake = -1
        self._found: list[str] = []  # who had the signals before
        self._in_c: dict[int, bytes] = {}  # the handlers that the system has

    @contextmanager
    def watch(self, wake: int) -> Iterator["Interruption"]:
        """Signals inside the `with` block are written to the file `wake`, a byte each, even while Python stands still.

        In the main thread alone; elsewhere nothing happens.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in self.NUMBERS}
        self._found = [_taken(number, handler) for number, handler in before.items() if handler not in USUAL]
        woken = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._wake = wake
        self._take()
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            self._wake = -1

    def _take(self) -> None:
        for number in self.NUMBERS:
            signal.signal(number, self._note)
            self._in_c[number] = _handler_in_c(number)

    def take_back(self) -> list[str]:
        """Takes back signals that a library or somebody's code has taken since; a line on each, for people."""
        if self._wake < 0 or threading.current_thread() is not threading.main_thread():
            return []
        said, self._found = self._found, []
        for number in self.NUMBERS:
            handler = signal.getsignal(number)
            if handler == self._note and _handler_in_c(number) == self._in_c[number]:
                continue
            said.append(_taken(number, None if handler == self._note else handler))
        if said:
            self._take()
        if signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False) != self._wake and not said:
            said.append("warning: a library had taken Python's wakeup descriptor; it has been taken back")
        return said

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def hear(self, name: str) -> str | None:
        """A signal has come; what to say if the process shall end now, None if it goes on to the end of this step."""
        now = time.monotonic()
        again, self.signal = self.signal is not None, self.signal or name
        self.asked = self.asked or name
        if not self.begun:
            return "nothing to save yet; the same command starts again from where this one did"
        if again:
            # A scheduler may signal a process and its parent, which passes it on: that is asked once.
            return None if now - self._heard < ONCE else "asked again, stopped at once; the last checkpoint is intact"
        self._heard = now
        os.write(2, f"{name}: saving after this step; once more to stop at once\n".encode())
        return None


def _taken(number: int, handler: Any) -> str:
    name = getattr(handler, "__qualname__", str(handler))
    who = "a library in C" if handler is None else f"{getattr(handler, '__module__', '')}.{name}"
    return (
        f"warning: {who} had taken {signal.Signals(number).name}, so that this run would not have been saved; it has "
        "been taken back"
    )


def _handler_in_c(number: int) -> bytes:
    """The address of the handler that the system has for a signal: libraries in C do not tell Python of theirs."""
    action = ctypes.create_string_buffer(512)  # struct sigaction begins with it
    ctypes.CDLL(None).sigaction(number, None, action)
    return action.raw[: ctypes.sizeof(ctypes.c_void_p)]
