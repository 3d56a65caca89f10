"""A small parent that starts a run again when that can help: `maejax pretrain --supervise`. It never imports JAX."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from maejax.errors import PeerLost, Preempted, Stalled
from maejax.parent import child_environment

AGAIN = {Preempted.exit_code: "was pre-empted", Stalled.exit_code: "stalled", PeerLost.exit_code: "lost a process"}
NO_PROGRESS = 3  # attempts in a row that came no further than those before; then it ends
LONGEST_PAUSE = 60.0  # seconds; the first is one, and each is twice the one before
TAIL = 65536  # bytes of metrics.jsonl that are looked at
Say = Callable[[str], None]


def supervise(
    command: Sequence[str], workdir: Path, *, say: Say = lambda text: print(text, flush=True), pause: float = 1.0
) -> int:
    """Runs `command` until it ends for good; its last exit code, as a shell reports it.

    It is started again after 75, 124, 134 and a death by a signal (`kill -9`, a segmentation fault, no memory left);
    not when this process itself was asked to stop, which it passes on, and not after three attempts in a row in which
    the run in `workdir` came no further.
    """
    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if child:
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        failures, furthest = 0, progress(workdir)
        while True:
            # In a group of its own: Ctrl-C reaches this process alone, which passes it on once.
            child = subprocess.Popen(command, env=child_environment(), process_group=0)
            if asked:  # it came in between
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            reached = progress(workdir)
            failures = 0 if reached > furthest else failures + 1
            furthest = max(reached, furthest)
            shell_code = 128 - code if code < 0 else code
            reason = reason_of(shell_code)
            if asked or reason is None:
                return shell_code
            where = f"supervise: the run {reason} (exit code {shell_code}) at step {furthest}"
            if failures >= NO_PROGRESS:
                say(f"{where}; {failures} attempts in a row came no further, so this is the end")
                return shell_code
            seconds = min(pause * 2 ** max(failures - 1, 0), LONGEST_PAUSE)
            further = f"{failures} of {NO_PROGRESS} attempts without progress; " if failures else ""
            say(f"{where}; {further}starting it again in {seconds:g} s")
            child = None
            deadline = time.monotonic() + seconds
            while not asked and time.monotonic() < deadline:
                time.sleep(0.05)
            if asked:
                return shell_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child and child.poll() is None:
            child.kill()
            child.wait()


def reason_of(code: int) -> str | None:
    """Why a run that ended with this code may do better when it is started again; None if it will not."""
    if code in AGAIN:
        return AGAIN[code]
    if code > 128 and code - 128 in set(signal.Signals):
        return f"was ended by {signal.Signals(code - 128).name}"
    return None


def progress(workdir: Path) -> int:
    """How far a run has come: the step of its newest sealed checkpoint, or of its last logged numbers."""
    # What `checkpoint.sealed_steps` finds, without JAX.
    sealed = [int(f.parent.name) for f in workdir.glob("checkpoints/*/manifest.json") if f.parent.name.isdigit()]
    return max([0, *sealed, *_logged(workdir / "metrics.jsonl")])


def _logged(file: Path) -> list[int]:
    try:
        with file.open("rb") as lines:
            lines.seek(max(os.fstat(lines.fileno()).st_size - TAIL, 0))
            found = []
            for line in lines.read().split(b"\n"):
                try:
                    found.append(int(json.loads(line)["step"]))
                except (ValueError, TypeError, KeyError):  # cut off at either end
                    continue
            return found
    except OSError:
        return []
