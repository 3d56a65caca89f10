"""Runs of maejax that start fast: a process that has imported everything forks one for each.

Half of what it costs to start a run is to import JAX and what stands on it; tests that kill runs start hundreds. What
is forked has no device yet, and is otherwise a process like any other: it can be killed, and has its own exit code.
"""

import atexit
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Run:
    """A process under way."""

    def __init__(self, server: "Server", pid: int, log: Path):
        self._server, self.pid, self.log = server, pid, log
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code (-9 after SIGKILL), or None."""
        if self._code is None:
            self._code = self._server.ask(poll=self.pid)
        return self._code

    def wait(self, seconds: float = 300) -> int:
        """The exit code; a run that does not end is killed."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.log} after {seconds} s:\n{self.text()[-2000:]}")
            time.sleep(0.01)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MAEJAX_", "OMPI_"))}
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Ends it; runs that it has started go on."""
        if self._process.poll() is None and self._process.stdin:
            self._process.stdin.close()
            self._process.wait(timeout=10)
            if self._process.stdout:
                self._process.stdout.close()

    def ask(self, **request: Any) -> Any:
        """The answer to a request."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: str, log: Path, devices: int = 1, file_size: int = -1, **env: str) -> Run:
        """`maejax ARGUMENTS` on so many virtual devices, with more environment, files of `file_size` bytes at most."""
        pid = self.ask(arguments=arguments, log=str(log), devices=devices, file_size=file_size, env=env)
        return Run(self, pid, log)

    def start_several(self, count: int, *arguments: str, log: Path, **more: Any) -> list[Run]:
        """So many processes of one run, each with one device."""
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            place = {
                "MAEJAX_COORDINATOR": f"127.0.0.1:{server.getsockname()[1]}", "MAEJAX_NUM_PROCESSES": str(count),
            }  # fmt: skip
        return [
            self.start(*arguments, log=log.with_suffix(f".{i}"), **place, MAEJAX_PROCESS_ID=str(i), **more)
            for i in range(count)
        ]


@functools.cache
def zygote() -> Server:
    """The one of this process."""
    return Server()


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
        os.environ.update(request["env"])
        if request["file_size"] >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        from maejax import faults

        wanted = os.environ.get(faults.VARIABLE, "")
        faults._wanted = [tuple(text.split(":")) for text in wanted.split(",") if text]
        import jax

        jax.config.update("jax_num_cpu_devices", request["devices"])
        sys.argv = ["maejax", *request["arguments"]]
        from maejax.cli import main

        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Serves until its input ends."""
    for module in ("commands.pretrain", "commands.finetune", "prepare", "train", "checkpoint", "evals.knn"):
        __import__(f"maejax.{module}")
    import sklearn.datasets  # noqa: F401
    import tensorboardX  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = _fork(request)
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
