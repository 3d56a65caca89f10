"""Processes of a run meet before JAX's runtime starts, which would end them without a word if one were missing.

Process 0 listens at the coordinator's address, each other process says there who it is and what it runs, and all get
one answer: go, or what is wrong. A minute at most; then the port is free again, for JAX. The connections stay open:
`peers.Line` is told over them how everybody is.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import select
import socket
import time
from pathlib import Path

from maejax.errors import UsageError

LINE = 1000  # bytes of a message, at most
HELLO = "maejax"
MUST_BE_SAME = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "simplejpeg", "cykooz.resizer",
)  # fmt: skip
Connections = dict[int, tuple[socket.socket, str]]  # by process: the connection, and its host


def call_roll(coordinator: str, bind: str, num_processes: int, process_id: int, *, seconds: float) -> Connections:
    """Returns when all processes have come: process 0 its connections to all others, they theirs to process 0.

    Args:
      coordinator: HOST:PORT where the others find process 0.
      bind: ADDRESS:PORT where process 0 listens.

    Raises:
      UsageError: the same on every process that came, with the ids that are missing or came twice, or with what one
        of them runs that process 0 does not.
    """
    deadline = time.monotonic() + seconds
    if process_id == 0:
        return _listen(bind, num_processes, deadline, seconds)
    return {0: (_report(coordinator, num_processes, process_id, deadline, seconds), coordinator.rpartition(":")[0])}


@functools.cache
def what_runs() -> dict[str, str]:
    """Versions of all that takes part in what a run computes, this project's code by its digest."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "maejax's code": code.hexdigest()[:12]}
    for name in MUST_BE_SAME:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # what is missing will be missed where it is imported
            continue
    return versions


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(bind: str, num_processes: int, deadline: float, seconds: float) -> Connections:
    try:
        server = socket.create_server(_split(bind), family=socket.AF_INET6 if "[" in bind else socket.AF_INET)
    except OSError as error:
        raise UsageError(
            f"process 0 cannot listen at {bind} ({os.strerror(error.errno or 0)}); is another run using that port? "
            "Name a free one with --coordinator=HOST:PORT"
        ) from None
    came: Connections = {}
    problem = ""
    with server:
        while len(came) < num_processes - 1 and not problem:
            ready = select.select([server], [], [], max(deadline - time.monotonic(), 0))[0]
            if not ready:
                missing = sorted(set(range(1, num_processes)) - set(came))
                problem = (
                    f"{len(missing)} of {num_processes} processes did not come within {seconds:g} s: "
                    f"{', '.join(map(str, missing[:20]))}; see their logs"
                )
                break
            problem = _admit(server.accept()[0], came, num_processes)
    for connection, _ in came.values():
        try:
            connection.sendall(f"{problem or 'go'}\n".encode())
        except OSError:
            continue  # it has gone meanwhile; the line will notice
    if problem:
        for connection, _ in came.values():
            connection.close()
        raise UsageError(problem)
    return came


def _admit(connection: socket.socket, came: Connections, num_processes: int) -> str:
    """Notes who has come; returns what is wrong with it, if anything."""
    connection.settimeout(5)
    try:
        hello, number, count, host, runs = json.loads(_read_line(connection))
        assert (hello, type(number), type(count), type(host), type(runs)) == (HELLO, int, int, str, dict)
    except (OSError, ValueError, AssertionError):  # a port scanner, or half a connection: nobody of ours
        connection.close()
        return ""
    twice = number in came or number == 0
    came[number if not twice else -len(came) - 1] = connection, host
    if count != num_processes or number >= num_processes:
        return f"process {number} expects {count} processes, process 0 expects {num_processes}"
    if twice:
        return f"two processes call themselves process {number}; each needs an id of its own"
    here = what_runs()
    other = [
        f"{name} {runs.get(name, 'none')} on process {number} ({host}), {here.get(name, 'none')} on process 0"
        for name in sorted(here | runs)
        if runs.get(name) != here.get(name)
    ]
    return f"processes do not run the same: {'; '.join(other)}"[: LINE - 1] if other else ""


def _read_line(connection: socket.socket) -> str:
    """A line and not a byte more: what follows is for somebody else."""
    text = b""
    while not text.endswith(b"\n") and len(text) < LINE:
        if not (byte := connection.recv(1)):
            break
        text += byte
    return text.decode(errors="replace").strip()


def _report(coordinator: str, num_processes: int, process_id: int, deadline: float, seconds: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection(_split(coordinator), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"process 0 did not answer at {coordinator} within {seconds:g} s ({error}); process {process_id} "
                    f"of {num_processes} gives up"
                ) from None
            time.sleep(0.1)
            continue
        # Process 0 waits until its own deadline, which may be later than ours.
        connection.settimeout(2 * seconds)
        hello = json.dumps([HELLO, process_id, num_processes, socket.gethostname(), what_runs()])
        try:
            connection.sendall(f"{hello}\n".encode())
            answer = _read_line(connection)
        except OSError:
            answer = ""
        if answer == "go":
            return connection
        connection.close()
        if answer or time.monotonic() > deadline:
            raise UsageError(answer or f"process 0 at {coordinator} broke off; see its log")
        time.sleep(0.1)
