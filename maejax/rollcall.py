"""Processes of a run meet before JAX's runtime starts, which would end them without a word if one were missing.

Process 0 listens at the coordinator's address, each other process says its number there, and all get one answer: go, or
what is wrong. A minute at most; then the port is free again, for JAX.
"""

import os
import select
import socket
import time

from maejax.errors import UsageError

LINE = 1000  # bytes of a message, at most
HELLO = "maejax"


def call_roll(coordinator: str, bind: str, num_processes: int, process_id: int, *, seconds: float) -> None:
    """Returns when all processes have come.

    Args:
      coordinator: HOST:PORT where the others find process 0.
      bind: ADDRESS:PORT where process 0 listens.

    Raises:
      UsageError: the same on every process that came, with the ids that are missing or came twice.
    """
    deadline = time.monotonic() + seconds
    if process_id == 0:
        _listen(bind, num_processes, deadline, seconds)
    else:
        _report(coordinator, num_processes, process_id, deadline, seconds)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(bind: str, num_processes: int, deadline: float, seconds: float) -> None:
    try:
        server = socket.create_server(_split(bind), family=socket.AF_INET6 if "[" in bind else socket.AF_INET)
    except OSError as error:
        raise UsageError(
            f"process 0 cannot listen at {bind} ({os.strerror(error.errno or 0)}); is another run using that port? "
            "Name a free one with --coordinator=HOST:PORT"
        ) from None
    came: dict[int, socket.socket] = {}
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
    for connection in came.values():
        with connection:
            try:
                connection.sendall(f"{problem or 'go'}\n".encode())
            except OSError:
                continue  # it has gone meanwhile; JAX will notice
    if problem:
        raise UsageError(problem)


def _admit(connection: socket.socket, came: dict[int, socket.socket], num_processes: int) -> str:
    """Notes who has come; returns what is wrong with it, if anything."""
    connection.settimeout(5)
    try:
        hello, process, count = connection.makefile().readline(LINE).split()
        number = int(process)
        assert hello == HELLO
    except (OSError, ValueError, AssertionError):  # a port scanner, or half a connection: nobody of ours
        connection.close()
        return ""
    twice = number in came or number == 0
    came[number if not twice else -len(came) - 1] = connection
    if int(count) != num_processes or number >= num_processes:
        return f"process {number} expects {count} processes, process 0 expects {num_processes}"
    return f"two processes call themselves process {number}; each needs an id of its own" if twice else ""


def _report(coordinator: str, num_processes: int, process_id: int, deadline: float, seconds: float) -> None:
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
        with connection:
            # Process 0 waits until its own deadline, which may be later than ours.
            connection.settimeout(2 * seconds)
            try:
                connection.sendall(f"{HELLO} {process_id} {num_processes}\n".encode())
                answer = connection.makefile().readline(LINE).strip()
            except OSError:
                answer = ""
        if answer == "go":
            return
        if answer or time.monotonic() > deadline:
            raise UsageError(answer or f"process 0 at {coordinator} broke off; see its log")
        time.sleep(0.1)
