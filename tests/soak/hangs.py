"""Signals, stalls and deaths, in real processes on this machine: rows 11 to 14, 29 and 35 to 37 of the matrix."""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from maejax.checkpoint import sealed_steps
from soak import Trial, campaign

ROOT = Path(__file__).parents[2]
STEPS = 30
TINY = (
    "--config=pretrain_digits", f"--config.total_steps={STEPS}", "--config.warmup_steps=4", "--config.batch_size=16",
    "--config.model.width=32", "--config.model.depth=2", "--config.decoder.width=16", "--config.log_steps=1",
    "--config.save_steps=10", "--config.evals=knn", "--config.eval_steps=10", "--config.eval_images=512",
    "--config.tensorboard=false", "--config.keep_checkpoints=9",
)  # fmt: skip
BUDGET = 12  # seconds that a phase may take where stalls are tried: long enough for two busy cores
CACHE = Path(tempfile.gettempdir()) / f"maejax-test-cache-{os.getuid()}-hangs"


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    at: float  # on the monotonic clock
    out: str


def environment(**more: str) -> dict[str, str]:
    """Without what a launcher or a shell has set."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MAEJAX_", "OMPI_"))}
    defaults = {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
    return clean | defaults | more


class Run:
    """Processes of one run, that find each other by flags."""

    def __init__(self, folder: Path, count: int, *flags: str, each: Sequence[dict[str, str]] = (), **env: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.workdir, self.processes, self.outs = folder / "run", [], []
        for process in range(count):
            place = (f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--process-id={process}")
            command = [sys.executable, "-m", "maejax", "pretrain", *TINY, f"--workdir={self.workdir}"]
            self.outs.append(folder / f"out-{time.monotonic_ns()}-{process}.txt")
            with self.outs[-1].open("w") as out:
                own = each[process] if each else {}
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--fake-devices=1", *(place if count > 1 else ()), *flags],
                        env=environment(**env | own), stdout=out, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def end(self, seconds: float = 120, *, without: Sequence[int] = ()) -> list[Ended]:
        """Waits for all of them to end, but for those in `without`, which are killed then."""
        ends: dict[int, float] = {}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not ends.keys() | set(without) >= set(range(len(self.processes))):
            for number, process in enumerate(self.processes):
                if number not in ends and process.poll() is not None:
                    ends[number] = time.monotonic()
            time.sleep(0.01)
        hung = [n for n, process in enumerate(self.processes) if process.poll() is None and n not in without]
        for process in self.processes:
            process.kill()
            process.wait()
        said = [out.read_text() for out in self.outs]
        assert not hung, f"processes {hung} hang: {said}"
        return [
            Ended(process.returncode, ends.get(number, time.monotonic()), said[number])
            for number, process in enumerate(self.processes)
        ]

    def wait_for_line(self, number: int, seconds: float = 120) -> None:
        """Until so many steps are logged."""
        file, deadline = self.workdir / "metrics.jsonl", time.monotonic() + seconds
        while not file.exists() or file.read_bytes().count(b'"train/loss"') < number:
            assert time.monotonic() < deadline, [out.read_text() for out in self.outs]
            assert all(process.poll() is None for process in self.processes), [out.read_text() for out in self.outs]
            time.sleep(0.01)


def goes_on(folder: Path, *, from_step: int | None = None) -> None:
    """The same command, in one process, finishes the run, each step logged and evaluated once."""
    run = Run(folder, 1)
    (end,) = run.end()
    assert end.code == 0, end.out
    if from_step is not None:
        assert (f"resuming at step {from_step}" in end.out) == (from_step > 0), end.out
    lines = (run.workdir / "metrics.jsonl").read_text()
    losses = [int(n) for n in re.findall(r'"step": (\d+), [^\n]*train/loss', lines)]
    assert losses == list(range(1, STEPS + 1)), losses
    worth = [int(n) for n in re.findall(r'"step": (\d+), [^\n]*eval/knn', lines)]
    assert worth == [10, 20, 30], worth


def no_traceback(ends: Sequence[Ended]) -> None:
    """Nothing that only a programmer understands."""
    for end in ends:
        assert "Traceback" not in end.out and "Check failure" not in end.out, end.out


# ---- Pre-emption ----------------------------------------------------------------------------------------------------


@campaign(
    row=11, trials=20, fast="test_resume.py", fault="SIGTERM at a random step, one process",
    promise="saved within a step, exit 75, resumed",
)  # fmt: skip
def sigterm_alone(trial: Trial) -> dict[str, float]:
    run = Run(trial.folder, 1)
    run.wait_for_line(trial.rng.randrange(1, STEPS - 4))
    start = time.monotonic()
    run.processes[0].send_signal(signal.SIGTERM)
    ends = run.end()
    assert ends[0].code == 75, ends[0].out
    no_traceback(ends)
    step = sealed_steps(run.workdir / "checkpoints")[-1]
    assert f"SIGTERM: saved step {step}" in ends[0].out or "is done when the same command" in ends[0].out, ends[0].out
    goes_on(trial.folder, from_step=step)
    return {"seconds to exit": ends[0].at - start}


@campaign(
    row=12, trials=8, fast="test_processes.py", fault="SIGTERM to one of four processes, each in turn",
    promise="all save the same step, all exit 75",
)  # fmt: skip
def sigterm_to_one_of_four(trial: Trial) -> dict[str, float]:
    run = Run(trial.folder, 4)
    run.wait_for_line(trial.rng.randrange(1, STEPS - 8))
    start = time.monotonic()
    run.processes[trial.number % 4].send_signal(signal.SIGTERM)
    ends = run.end()
    assert [end.code for end in ends] == [75] * 4, ends
    no_traceback(ends)
    steps = {step for end in ends for step in re.findall(r"saved step (\d+)", end.out)}
    assert len(steps) <= 1, steps
    goes_on(trial.folder, from_step=sealed_steps(run.workdir / "checkpoints")[-1])
    return {"seconds to exit": max(end.at for end in ends) - start}


PHASES = ("restore", "compile", "data", "evaluate", "save", "barrier")


@campaign(
    row=13, trials=40, fast="test_hangs.py",
    fault="SIGTERM in restore, compile, data, evaluation, save, a barrier; one process, and either of two",
    promise="exit 75 on all, nothing half-written, the run goes on; evaluations that were cut are done then",
)  # fmt: skip
def sigterm_in_a_phase(trial: Trial) -> dict[str, float]:
    phase, count = PHASES[trial.number % len(PHASES)], 1 + trial.number // len(PHASES) % 2
    count = 2 if phase == "barrier" else count  # one process alone has none
    victim = trial.rng.randrange(count)
    # Half of the trials interrupt a run that goes on from a checkpoint.
    before = 0
    if trial.number % 4 > 1:
        first = Run(trial.folder, 1, MAEJAX_FAULT="save:0:2:term")
        (end,) = first.end()
        assert end.code == 75, end.out
        before = sealed_steps(first.workdir / "checkpoints")[-1]
    run = Run(trial.folder, count, MAEJAX_FAULT=f"{phase}:{victim}:1:term")
    ends = run.end()
    assert [end.code for end in ends] == [75] * count, ends
    no_traceback(ends)
    sealed = sealed_steps(run.workdir / "checkpoints")
    if phase in ("restore", "compile"):
        assert max(sealed, default=0) == before, sealed
    goes_on(trial.folder, from_step=max(sealed, default=0))
    return {}


@campaign(
    row=13, trials=20, fault="SIGTERM at a random moment of the first seconds, one process, cold cache of programs",
    promise="exit 75, the run goes on",
)  # fmt: skip
def sigterm_at_any_moment(trial: Trial) -> dict[str, float]:
    run = Run(trial.folder, 1, JAX_COMPILATION_CACHE_DIR=str(trial.folder / "cache"))
    time.sleep(trial.rng.uniform(0.5, 12))
    start = time.monotonic()
    run.processes[0].send_signal(signal.SIGTERM)
    (end,) = run.end()
    # Python itself needs some tenths of a second until it is asked to watch signals, and watches no longer at its end.
    done = f"done      {run.workdir} at step {STEPS}" in end.out and end.code in (0, -signal.SIGTERM)
    assert end.code == 75 or done or (end.code == -signal.SIGTERM and not end.out), (end.code, end.out)
    no_traceback([end])
    goes_on(trial.folder)
    return {"seconds to exit": end.at - start}


@campaign(
    row=14, trials=10, fault="a second SIGTERM while the first one's save hangs",
    promise="exit 75 at once, the last checkpoint intact",
)  # fmt: skip
def sigterm_twice(trial: Trial) -> dict[str, float]:
    count = 1 + trial.number % 2
    run = Run(trial.folder, count, MAEJAX_FAULT="save:*:2:sleep=100")
    run.wait_for_line(trial.rng.randrange(11, 16))
    victim = run.processes[trial.rng.randrange(count)]
    victim.send_signal(signal.SIGTERM)
    time.sleep(trial.rng.uniform(1, 2))
    victim.send_signal(signal.SIGTERM)
    start = time.monotonic()
    ends = run.end()
    assert [end.code for end in ends] == [75] * count, ends
    no_traceback(ends)
    goes_on(trial.folder, from_step=10)
    return {"seconds to exit": max(end.at for end in ends) - start}


@campaign(
    row=14, trials=20, fault="SIGKILL 0.05 to 2 s after SIGTERM: a grace shorter than the save",
    promise="the run goes on from the last sealed checkpoint",
)  # fmt: skip
def killed_while_saving(trial: Trial) -> None:
    run = Run(trial.folder, 1, "--config.eval_steps=None", "--config.evals=none")
    run.wait_for_line(trial.rng.randrange(11, 25))
    run.processes[0].send_signal(signal.SIGTERM)
    time.sleep(trial.rng.choice((0.05, 0.2, 0.5, 1, 2)))
    run.processes[0].kill()
    run.end()
    sealed = sealed_steps(run.workdir / "checkpoints")  # none, if it came before the first save was done
    again = Run(trial.folder, 1, "--config.eval_steps=None", "--config.evals=none")
    (end,) = again.end()
    assert end.code == 0, end.out
    assert re.findall(r"resuming at step (\d+)", end.out) == [str(step) for step in sealed[-1:]], end.out


# ---- Stalls ---------------------------------------------------------------------------------------------------------

STALLS = list(itertools.product(("sleep=1000", "hold=1000", "stop"), (*PHASES, "step")))


@campaign(
    row=35, trials=42, fast="test_hangs.py, test_watchdog.py",
    fault="one of two or four processes sleeps, is stopped, or holds Python's lock, in each phase",
    promise="the late one is named by all, stacks are written, exit 124 within the budget + 10 s",
)  # fmt: skip
def one_process_stalls(trial: Trial) -> dict[str, float]:
    action, phase = STALLS[trial.number % len(STALLS)]
    count = 4 if trial.number % 7 == 3 else 2
    victim = trial.rng.randrange(count)
    time_ = {"step": 12, "data": 12, "barrier": 6}.get(phase, 1)
    limits = f"{phase}={BUDGET}"
    if phase in ("data", "save", "barrier"):  # of the two processes, one is in the phase before or after it
        limits = f"{BUDGET},start={3 * BUDGET},compile={5 * BUDGET}"
    run = Run(
        trial.folder, count, MAEJAX_FAULT=f"{phase}:{victim}:{time_}:{action}", MAEJAX_STALL_SECONDS=limits
    )  # fmt: skip
    ends = run.end(150, without=[victim] if action == "stop" else [])
    for number, end in enumerate(ends):
        if number == victim and action == "stop":
            continue
        assert end.code == 124, (number, end)
        if number != victim or action != "hold=1000":  # it cannot say anything, but for its stacks
            assert f"process {victim} on " in end.out.split("stalled: ")[1], (number, end)
        stacks = (run.workdir / f"stacks-{number}.txt").read_text()
        assert "most recent call first" in stacks, (number, stacks)
    return {"spread of exits, s": max(end.at for end in ends) - min(end.at for end in ends)}


@campaign(
    row=35, trials=20, fault="none: whole runs with short budgets, one and two processes", promise="no false alarm"
)
def no_stall_no_alarm(trial: Trial) -> None:
    run = Run(trial.folder, 1 + trial.number % 2, MAEJAX_STALL_SECONDS=f"{2 * BUDGET},start=60,compile=60")
    assert [end.code for end in run.end()] == [0] * len(run.processes)
    assert not list(run.workdir.glob("stacks-*")), "files of stacks that stayed empty are removed"


# ---- Deaths ---------------------------------------------------------------------------------------------------------

DEATHS = list(itertools.product(("kill", "abort", "segv", "raise=EIO", "raise=trouble"), (*PHASES, "step")))


@campaign(
    row=36, trials=70, fast="test_hangs.py",
    fault="one of two or four processes dies by SIGKILL, SIGABRT, SIGSEGV or an exception, in each phase",
    promise="the others exit 134 within 5 s, with the first cause in one line",
)  # fmt: skip
def one_process_dies(trial: Trial) -> dict[str, float]:
    action, phase = DEATHS[trial.number % len(DEATHS)]
    count = 4 if trial.number % 7 == 3 else 2
    victim = trial.number % count
    time_ = "12" if phase in ("step", "data") else "1"
    run = Run(trial.folder, count, MAEJAX_FAULT=f"{phase}:{victim}:{time_}:{action}")
    ends = run.end()
    own = {"kill": -9, "abort": -6, "segv": -11}.get(action, 1)
    assert ends[victim].code == own, ends[victim]
    others = [end for number, end in enumerate(ends) if number != victim]
    no_traceback(others)
    for end in others:
        assert end.code == 134, end
        last = end.out.strip().splitlines()[-1]
        assert last.startswith(f"maejax: process {victim} on "), end.out
        assert ("died (no word" in last) == (own < 0) and (own < 0 or action[6:] in last or "Errno 5" in last), last
    took = max(end.at for end in others) - ends[victim].at
    assert took < 5, took
    return {"seconds to the last exit": took}


@campaign(
    row=36, trials=4, fast="test_supervise.py", fault="a process that dies in every attempt, under --supervise",
    promise="it stops after three attempts without progress",
)  # fmt: skip
def crash_loop(trial: Trial) -> None:
    count = 1 + trial.number % 2
    run = Run(trial.folder, count, "--supervise", MAEJAX_FAULT="compile:0:1:kill")
    ends = run.end(300)
    assert ends[0].code == 137 and "attempts in a row came no further, so this is the end" in ends[0].out, ends[0]
    assert ends[0].out.count("starting it again") == 2


@campaign(
    row=36, trials=6, fast="test_supervise.py", fault="kill -9 of one of two processes under --supervise",
    promise="the run is started again on all and ends as it should",
)  # fmt: skip
def supervised(trial: Trial) -> None:
    run = Run(trial.folder, 2, "--supervise")
    run.wait_for_line(trial.rng.randrange(11, 25))
    supervisor = run.processes[trial.number % 2].pid
    (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    ends = run.end(300)
    assert [end.code for end in ends] == [0, 0], ends
    assert all("starting it again" in end.out for end in ends)
    goes_on(trial.folder, from_step=STEPS)


# ---- Starts ---------------------------------------------------------------------------------------------------------


@campaign(
    row=29, trials=8, fast="test_processes.py, test_peers.py",
    fault="one process with another seed, batch, data, code, Python package, jax or orbax",
    promise="all refuse, with the difference, before a step",
)  # fmt: skip
def started_differently(trial: Trial) -> dict[str, float]:
    kind = ("seed", "batch_size", "data.source", "mask.ratio", "code", "jax", "orbax-checkpoint", "numpy")[trial.number]
    each, flags = [{}, {}], ()
    if kind == "code":
        shutil.copytree(ROOT / "maejax", trial.folder / "other" / "maejax")
        shutil.copytree(ROOT / "configs", trial.folder / "other" / "configs")
        with (trial.folder / "other" / "maejax" / "step.py").open("a") as file:
            file.write("# changed\n")
        each[1] = {"PYTHONPATH": str(trial.folder / "other"), "PYTHONSAFEPATH": "1"}  # not what lies in this folder
    elif kind in ("jax", "orbax-checkpoint", "numpy"):
        info = trial.folder / "other" / f"{kind.replace('-', '_')}-9.9.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {kind}\nVersion: 9.9\n")
        each[1] = {"PYTHONPATH": f"{trial.folder / 'other'}:{ROOT}"}
    else:
        value = {"seed": "1", "batch_size": "32", "data.source": "digits:other", "mask.ratio": "0.5"}[kind]
        flags = (f"--config.{kind}={value}",)
    start = time.monotonic()
    if flags:
        run = Run(trial.folder, 2, each=each)
        run.processes[1].kill()
        run.processes[1].wait()
        run.processes[1] = subprocess.Popen(
            [*run.processes[1].args, *flags], env=environment(), stdout=run.outs[1].open("w"), stderr=subprocess.STDOUT
        )
    else:
        run = Run(trial.folder, 2, each=each)
    ends = run.end(100)
    assert [end.code for end in ends] == [2, 2], ends
    no_traceback(ends)
    if kind != "data.source":
        for end in ends:
            assert kind.partition(".")[0] in end.out.strip().splitlines()[-1], end.out
    assert not (run.workdir / "config.json").exists()
    return {"seconds to exit, start of Python and JAX included": max(end.at for end in ends) - start}


@campaign(
    row=37, trials=4, fast="test_distributed.py", fault="a process that never starts; a wrong port",
    promise="named within the arrival time + 5 s, before anything is compiled",
)  # fmt: skip
def missing_process(trial: Trial) -> dict[str, float]:
    run = Run(trial.folder, 3, "--config.batch_size=18", MAEJAX_ARRIVAL_SECONDS="15")
    run.processes[2].kill()
    start = time.monotonic()
    ends = run.end(without=[2])[:2]
    assert [end.code for end in ends] == [2, 2], ends
    assert all("1 of 3 processes did not come within 15 s: 2" in end.out for end in ends), ends
    return {"seconds to exit": max(end.at for end in ends) - start}


@campaign(
    row=37, trials=6, fault="one of two or four processes waits three steps' time for its data, at every step",
    promise="named with its phase within 40 steps, no other is",
)  # fmt: skip
def straggler(trial: Trial) -> None:
    count = 2 + 2 * (trial.number % 2)
    victim = trial.rng.randrange(count)
    run = Run(
        trial.folder, count, "--config.total_steps=60", "--config.evals=none", "--config.eval_steps=None",
        MAEJAX_FAULT=f"data:{victim}:*:sleep=0.5",
    )  # fmt: skip
    ends = run.end(200)
    assert [end.code for end in ends] == [0] * count, ends
    warnings = re.findall(r"warning: process (\d) on \S+ is slow: .* a step \(data (\S+) s", ends[0].out)
    assert warnings and {int(number) for number, _ in warnings} == {victim}, ends[0].out
    assert all(abs(float(seconds) - 0.5) < 0.1 for _, seconds in warnings), warnings
