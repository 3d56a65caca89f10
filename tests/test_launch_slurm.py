"""`maejax launch --on=slurm --submit` with real Slurm daemons: to the end, and through an interruption.

`make slurm` installs Slurm where that is possible and runs this; `tests/slurm/cluster.sh` starts a cluster of one node.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import maejax

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PRETRAIN = [
    "pretrain", "--config=pretrain_digits", "--config.model.width=32", "--config.model.heads=4",
    "--config.model.depth=1", "--config.decoder.width=16", "--config.decoder.depth=1", "--config.decoder.heads=4",
    "--config.tensorboard=false", "--config.evals=none", "--config.batch_size=64", "--config.warmup_steps=10",
    "--config.log_steps=5", "--config.picture_steps=1000000", "--config.data.workers=0",
]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"),
        reason="no Slurm: tests/slurm/cluster.sh install",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where jobs are submitted, beside a running cluster."""
    place = tmp_path_factory.mktemp("slurm")
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PYTHONPATH", "JAX_PLATFORMS")}
    os.environ |= {"SLURM_CONF": str(place / "cluster/slurm.conf"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    try:
        subprocess.run([CLUSTER, "start", place / "cluster"], check=True)
        yield place
    finally:
        subprocess.run([CLUSTER, "stop", place / "cluster"], check=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(folder: Path, run: str, tasks: int, steps: int, *options: str) -> str:
    """Submits a run; returns the job's number."""
    said = output(
        sys.executable, "-m", "maejax", "launch", "--on=slurm", f"--tasks-per-node={tasks}", "--submit", *options,
        *PRETRAIN, f"--config.steps={steps}", f"--workdir={run}", cwd=folder,
    )  # fmt: skip
    return said.split()[-1]  # Submitted batch job N


def job(number: str, key: str) -> str:
    fields = output("scontrol", "show", "job", number).split()
    return next(field.partition("=")[2] for field in fields if field.startswith(f"{key}="))


def wait(folder: Path, true: Callable[[], bool]) -> None:
    """Until it is true, four minutes at most; then what the jobs have said."""
    for _ in range(2400):
        if true():
            return
        time.sleep(0.1)
    logs = "\n".join(f"{path}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("*/launch/*.log")))
    pytest.fail(f"waited four minutes; {logs}")


def wait_for_steps(folder: Path, run: str) -> None:
    """Until a run has something to save."""
    metrics = folder / run / "metrics.jsonl"
    wait(folder, lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)


def finish(folder: Path, number: str) -> None:
    wait(folder, lambda: job(number, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"))


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines}


def processes(run: Path) -> str:
    """How many processes the run's log says that it had at its last start."""
    starts = [line for line in (run / "train.log").read_text().splitlines() if " processes x " in line]
    return starts[-1].split("=")[1].split()[0]


def interrupted(folder: Path, run: str, tasks: int, steps: int) -> str:
    """A run that is interrupted once it has made some steps; returns the job's number."""
    number = launch(folder, run, tasks, steps)
    wait_for_steps(folder, run)
    output("scancel", "--signal=TERM", number)
    wait(folder, lambda: job(number, "Restarts") == "1")
    return number


def test_an_interrupted_job_saves_is_requeued_and_ends_as_if_nothing_had_been(folder):
    steps, whole, cut, alone = 200, "whole", "cut", "alone"
    finish(folder, first := launch(folder, whole, 2, steps))
    number = interrupted(folder, cut, 2, steps)
    assert f"SIGTERM: saved step {(stopped := saved(folder / cut, number))};" in logs_of_tasks(folder / cut, number)
    assert 10 <= stopped < steps
    finish(folder, number)
    for run, restarts, job_number in ((whole, "0", first), (cut, "1", number)):
        assert job(job_number, "JobState") == "COMPLETED" and job(job_number, "Restarts") == restarts
        assert processes(folder / run) == "2"
        assert len(list((folder / run / "launch").glob(f"slurm-{job_number}-*.log"))) == 2
    assert "ended with 75 after 0 restarts" in (folder / cut / f"launch/slurm-{number}.log").read_text()
    assert f"resuming at step {stopped}" in (folder / cut / "train.log").read_text()
    assert losses(folder / cut) == losses(folder / whole) and len(losses(folder / whole)) == steps // 5
    weights = [maejax.load_encoder(folder / run)[1] for run in (whole, cut)]
    jax.tree.map(np.testing.assert_array_equal, *weights)

    output(sys.executable, "-m", "maejax", *PRETRAIN, f"--config.steps={steps}", f"--workdir={alone}", cwd=folder)
    expected = losses(folder / alone)
    assert expected.keys() == losses(folder / whole).keys()
    for step, loss in losses(folder / whole).items():
        assert abs(loss - expected[step]) < 1e-5, step


def logs_of_tasks(run: Path, number: str) -> str:
    return "".join(path.read_text() for path in (run / "launch").glob(f"slurm-{number}-*.log"))


def saved(run: Path, number: str) -> int:
    """The step that the interrupted run says it has saved."""
    return int(logs_of_tasks(run, number).partition("saved step ")[2].partition(";")[0])


def test_restarts_have_a_limit(folder):
    number = launch(folder, "limited", 1, 100_000, "--restarts=0")
    wait_for_steps(folder, "limited")
    output("scancel", "--signal=TERM", number)
    finish(folder, number)
    assert job(number, "JobState") == "FAILED" and job(number, "ExitCode") == "75:0" and job(number, "Restarts") == "0"


def test_scancel_alone_ends_a_job_for_good(folder):
    number = launch(folder, "cancelled", 1, 100_000)
    wait_for_steps(folder, "cancelled")
    output("scancel", number)
    wait(folder, lambda: "saved step" in logs_of_tasks(folder / "cancelled", number))
    finish(folder, number)
    time.sleep(1)
    assert job(number, "JobState") == "CANCELLED" and job(number, "Restarts") == "0"
