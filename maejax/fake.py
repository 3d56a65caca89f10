"""A run of several processes on one machine, to try out what a pod will do: real processes, real collectives (gloo)."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from maejax.parent import child_environment

LAST_SECONDS = 20  # that the other processes have to end after the first has failed


def pretend_devices(count: int) -> None:
    """Makes JAX see `count` devices on this machine's CPU. JAX must not have been imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)


def run_processes(arguments: Sequence[str], num_processes: int) -> int:
    """Runs `maejax ARGUMENTS` in `num_processes` processes; returns the exit code of the first that failed, or 0.

    Signals are passed on. Process 0 speaks, the others only of errors.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for process in range(num_processes):
        place = {
            "MAEJAX_COORDINATOR": f"127.0.0.1:{port}",
            "MAEJAX_NUM_PROCESSES": str(num_processes),
            "MAEJAX_PROCESS_ID": str(process),
        }
        env = child_environment(place)
        children.append(subprocess.Popen([sys.executable, "-m", "maejax", *arguments], env=env))

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    # Ctrl-C in a terminal reaches the children without help, and a second signal would stop them at once.
    before = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return _wait(children)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
        for child in children:
            child.kill()
            child.wait()


def _wait(children: "Sequence[subprocess.Popen[bytes]]") -> int:
    deadline = float("inf")
    failure = 0
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if not failure and any(codes):
            failure = next(code for code in codes if code)
            deadline = time.monotonic() + LAST_SECONDS
        time.sleep(0.05)
    failure = failure or next((code for code in (child.poll() for child in children) if code), 0)
    return 128 - failure if failure < 0 else failure  # as a shell reports a signal
