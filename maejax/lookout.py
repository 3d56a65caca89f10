"""A thread that looks out while the main one works: for signals, for what has taken too long, for the other processes.

The main thread is in XLA or in Orbax for minutes, where Python's signal handlers wait; and it is blind while it waits
for the others. This thread ends the process where no one else can: at once, by `_exit`, with one line that says why.
"""

import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from maejax import watchdog
from maejax.errors import MaejaxError, Preempted, Stalled
from maejax.parent import parent_has_gone
from maejax.peers import Line
from maejax.redact import masked
from maejax.rollcall import Connections
from maejax.signals import Interruption

POLL = 0.2  # seconds
LAST_SECONDS = 5.0  # that the last words may take
FOLLOW_SECONDS = 2.0  # that an error waits for its cause in another process
Say = Callable[[str], None]


class Lookout:
    """What the thread sees, and what the main thread tells it."""

    def __init__(self) -> None:
        self.interruption = Interruption()
        self.say: Say = lambda text: print(text, flush=True)  # the run's console, when there is one
        self.log: Say = lambda text: None  # train.log alone
        self._line: Line | None = None
        self._closed = threading.Event()
        self._pondered: BaseException | None = None
        self._free = threading.Event()  # the main thread may go: all processes have come to their end
        self._told: list[tuple[str, int, str]] = []  # by the main thread, for the line
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)

    # ---- For the main thread ----------------------------------------------------------------------------------------

    def join(self, process: int, connections: Connections) -> None:
        """Has found the other processes of the run."""
        self._line = Line(process, connections) if connections else None

    def leave(self, code: int = 0, text: str = "") -> None:
        """Before this process ends as all should: waits until they have come as far, or the lookout ends it."""
        if self._line:
            with watchdog.waiting():
                self._tell("leave", code, text)
                self._free.wait()

    def failed(self, error: BaseException) -> None:
        """Before this process ends with an error; does not return if it can tell the others no other way."""
        if isinstance(error, MaejaxError | KeyboardInterrupt):
            self.leave(getattr(error, "exit_code", 130), " ".join(str(error).split()))
        elif self._line:
            self.hear_cause(error)
            print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
            self._tell("end", 1, f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip())
            self._closed.wait()

    def hear_cause(self, error: BaseException | None) -> None:
        """With an error of a library, before anything is closed: does not return if another process is the cause.

        Libraries say so in many ways, as ValueError or as JaxRuntimeError; the line knows in a moment.
        """
        if self._line and error is not self._pondered and not isinstance(error, MaejaxError | KeyboardInterrupt):
            self._pondered = error
            self._closed.wait(FOLLOW_SECONDS)

    def _tell(self, what: str, code: int, text: str) -> None:
        self._told.append((what, code, text))
        self._woken.send(b"\0")

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        try:
            self._look_out()
        except BaseException:  # a mistake of ours; without this thread nobody would notice a stall
            traceback.print_exc()
            os._exit(1)

    def _look_out(self) -> None:
        while not self._closed.is_set():
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake, selectors.EVENT_READ)
                for connection in self._line.sockets() if self._line else ():
                    selector.register(connection, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(POLL)]
            if self._wake in ready:
                for number in filter(None, self._wake.recv(1000)):  # zeros only wake
                    self._hear(number)
            if parent_has_gone():
                os._exit(1)
            line = self._line
            if line is None:
                self._free.set()
                if time.monotonic() > watchdog.progress.deadline:
                    self._end(Stalled.exit_code, f"stalled: {watchdog.progress.where()} took too long")
                continue
            for connection in line.sockets():
                if connection in ready:
                    line.read(connection)
            self._attend(line)

    def _attend(self, line: Line) -> None:
        now = time.monotonic()
        line.beat(now=now)
        while self._told:
            what, code, text = self._told.pop(0)
            if what == "leave":
                line.leave(code, text)
            else:
                host = line.peers[line.process].host
                self._end(code, text, f"process {line.process} on {host} ended: {text}", others=134, quiet=True)
        for text in line.warnings:
            self.say(text)
        line.warnings.clear()
        if line.all_left:
            self._free.set()
        elif verdict := line.judge(now):
            self._end(verdict.code, verdict.text)
        elif now > watchdog.progress.deadline:  # others are late, and may be; while this thread runs it decides
            watchdog.hold_off(watchdog.MARGIN)

    def _hear(self, number: int) -> None:
        """A signal has come. Once: saves after this step, if there is anything to save. Twice: leaves at once."""
        asked = self.interruption.hear(signal.Signals(number).name)
        if asked:
            name = self.interruption.signal or ""
            who = f"process {self._line.process} got {name}" if self._line else name
            self._end(Preempted.exit_code, f"{name}: {asked}", f"{who}: {asked}", others=Preempted.exit_code)

    def _end(self, code: int, text: str, for_others: str = "", *, others: int = 0, quiet: bool = False) -> None:
        """Ends this process, and with `others` the other ones, too."""
        text = masked(text)
        try:
            watchdog.hold_off(LAST_SECONDS)
            if code == Stalled.exit_code:
                text += f"; the stacks of all threads are in {watchdog.dump_stacks()}"
            if not quiet:
                os.write(2, f"maejax: {text}\n".encode())  # print could wait for whoever holds the stream
            if line := self._line:
                if for_others:
                    line.end(others, for_others)
                self._last_words(line)
            if not quiet:
                self.log(f"ended     {text}")
        finally:  # whatever else goes wrong now
            os._exit(code)

    def _last_words(self, line: Line) -> None:
        """Until the others have heard: process 0 waits for them to go, they wait for its answer."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and line.sockets() and (line.process == 0 or line.verdict is None):
            for connection in line.sockets():
                line.read(connection)
            time.sleep(0.02)


# ---- One for a process ----------------------------------------------------------------------------------------------

_lookout: Lookout | None = None


@contextmanager
def looking_out() -> Iterator[Lookout]:
    """A lookout and an armed watchdog inside the `with` block; in an inner one, those of the outer."""
    global _lookout
    if _lookout:
        yield _lookout
        return
    watchdog.arm()
    lookout = _lookout = Lookout()
    lookout._thread.start()
    try:
        with lookout.interruption.watch(lookout._woken.fileno()):
            yield lookout
    except BaseException as error:
        lookout.failed(error)
        raise
    else:
        lookout.leave()
    finally:
        watchdog.disarm()
        lookout._closed.set()
        lookout._woken.send(b"\0")
        lookout._thread.join()
        lookout._wake.close()
        lookout._woken.close()
        _lookout = None


def write_to(workdir: Path, process: int, say: Say, log: Say) -> None:
    """From now on stacks go into the run's folder, and words to its console."""
    if _lookout:
        watchdog.stacks_to(workdir / f"stacks-{process}.txt")
        _lookout.say, _lookout.log = say, log
