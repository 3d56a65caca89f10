"""A sweep's points on this machine: child processes, one after the other or several at once.

A point is run under its own lock, so that a sweep which was killed, and whose child was not, waits for the child and
goes on behind it.
"""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from maejax import ranking, sweep
from maejax.errors import Preempted, UsageError
from maejax.metrics import duration
from maejax.sweep import Point, Sweep

POLL = 0.1  # seconds between looks at the children
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Child:
    """A point under way."""

    process: subprocess.Popen[bytes]
    point: Point
    since: float
    log: Path
    before: int  # bytes that earlier attempts have left in the log

    def last_words(self) -> str:
        """What it said when it ended: the line of its error, or its last."""
        with self.log.open("rb") as file:
            file.seek(self.before)
            lines = file.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return next((line for line in reversed(lines) if line.startswith("maejax: ")), lines[-1]).removeprefix(
            "maejax: "
        )


class Children:
    """The processes under way, and whether a signal has asked all of them to stop."""

    def __init__(self) -> None:
        self.running: list[Child] = []
        self.signal: str | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT inside the `with` block."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        for child in self.running:
            child.process.send_signal(signal.SIGTERM)

    def start(self, point: Point) -> None:
        """Starts a point; what it prints goes to the sweep's logs/."""
        log = point.workdir.parent / "logs" / f"{point.name}.txt"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "maejax", *point.arguments, f"--workdir={point.workdir}"]
        with log.open("ab") as out:
            before = out.tell()
            # In a group of its own: Ctrl-C reaches the sweep alone, which passes it on once. A second signal would
            # make the child exit without saving.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0
            )
        self.running.append(Child(process, point, time.monotonic(), log, before))
        if self.signal:  # it came in between
            process.send_signal(signal.SIGTERM)

    def ended(self) -> Iterator[Child]:
        """Those that have ended since the last look."""
        for child in list(self.running):
            if child.process.poll() is not None:
                self.running.remove(child)
                yield child


def run(asked: Sweep, *, jobs: int, say: Say) -> None:
    """Runs what is not done, `jobs` points at once; a broken point is noted and the others go on.

    Raises:
      Preempted: a signal came, or stopped a point; its state is saved, and the same sweep again goes on.
    """
    numbered = {point.name: f"[{i}/{len(asked.points)}] {point.name}" for i, point in enumerate(asked.points, 1)}
    waiting = [point for point in asked.points if sweep.state(point).kind != "done"]
    stopped: list[str] = []
    told: set[str] = set()
    children = Children()
    with children.watch():
        while children.running or (waiting and not children.signal):
            while waiting and len(children.running) < jobs and not children.signal:
                point = waiting[0]
                if sweep.is_running(point):
                    if point.name not in told:
                        told.add(point.name)
                        say(f"{numbered[point.name]}: another process is at it; waiting")
                    break
                waiting.pop(0)
                if sweep.state(point).kind == "done":  # by that other process
                    continue
                sweep.note_failure(asked.workdir, point.name, None)
                step = sweep.state(point).step
                say(f"{numbered[point.name]}: " + (f"resuming at step {step:,}" if step else "starting"))
                children.start(point)
            for child in children.ended():
                name = child.point.name
                if child.process.returncode == UsageError.exit_code and sweep.is_running(child.point):
                    waiting.insert(0, child.point)  # a child that a killed sweep left was starting, and came first
                    continue
                outcome = _outcome(child, stopping=children.signal is not None)
                stopped += [name] if outcome.startswith("stopped") else []
                say(f"{numbered[name]}: {outcome}")
            time.sleep(POLL)
    if children.signal or stopped:
        cause = children.signal or f"{', '.join(stopped)} stopped"
        raise Preempted(f"{cause}: what was under way is saved; maejax sweep {asked.workdir} goes on from there")


def _outcome(child: Child, *, stopping: bool) -> str:
    """What became of a point, in a line; a failure is noted in the sweep's folder."""
    code, point = child.process.returncode, child.point
    took = duration(time.monotonic() - child.since)
    if code == 0 and sweep.state(point).kind == "done":
        values = ranking.numbers(point)
        listed = ", ".join(
            f"{name} {ranking.shown_number(name, values[name], None)}" for name in ranking.MEASURES if name in values
        )
        return f"done in {took}" + (f", {listed}" if listed else "")
    if code == Preempted.exit_code or (stopping and code == -signal.SIGTERM):
        return f"stopped after {took} at step {sweep.state(point).step:,}"
    message = f"exit code {code}: {child.last_words()}"
    sweep.note_failure(point.workdir.parent, point.name, message)
    return f"broken after {took}, {message} (see {child.log})"
