"""Runs that are stopped and killed, as users' processes: what comes out is, bit for bit, what others give."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from zygote import zygote

from maejax.ledger import expected_chain
from maejax.manifest import read_meta, sealed_steps
from maejax.tree import named_leaves

STEPS = 160
TINY = (
    "--config=pretrain_digits", f"--config.total_steps={STEPS}", "--config.warmup_steps=10", "--config.batch_size=16",
    "--config.model.width=32", "--config.model.depth=2", "--config.decoder.width=16", "--config.log_steps=1",
    "--config.save_steps=20", "--config.picture_steps=70", "--config.evals=knn", "--config.eval_steps=60",
    "--config.eval_images=128",
    "--config.seed=3", "--config.optimizer.ema_decay=0.9",
)  # fmt: skip


def start(workdir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "maejax", "pretrain", *TINY, f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(workdir: Path, *flags: str) -> str:
    process = start(workdir, *flags)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def wait_for_line(workdir: Path, process: subprocess.Popen, number: int = 1) -> None:
    """Until a run has logged so many steps (or has ended)."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        file = workdir / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.01)


def outcome(workdir: Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Everything in the last checkpoint, and every logged number that is not about speed."""
    folder = workdir / "checkpoints" / str(STEPS)
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}, kept


def assert_same_outcome(left, right):
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        np.testing.assert_array_equal(left[0][name], right[0][name], err_msg=name)
    assert left[1] == right[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir)
    got = outcome(workdir)
    assert [line["step"] for line in got[1] if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in got[1] if "eval/knn_top1" in line] == [60, 120, STEPS]
    return got


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_exits_75_and_goes_on_exactly(name, tmp_path, undisturbed):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_line(workdir, process, 33)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert f"{name}: saved step" in out and "Traceback" not in out
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert stopped >= 33 and stopped < STEPS
    assert f"resuming at step {stopped}" in finish(workdir)
    assert_same_outcome(outcome(workdir), undisturbed)


# Ten runs, killed with SIGKILL: at moments after the start, after the first step, at named points of a save.
KILLS = [
    *[("start",), ("start", "step 1"), ("step 1",), ("step 1",), ("step 1",), ("step 1",)],
    *[("seal.rename:0:3:kill",), ("save.commit:0:2:kill",), ("retain.renamed:0:1:kill",), ("save.copied:0:2:kill",)],
]


@pytest.mark.parametrize("trial", range(len(KILLS)))
def test_killed_at_any_moment_it_goes_on_exactly(trial, tmp_path, undisturbed):
    rng, workdir, log = random.Random(trial), tmp_path / "run", tmp_path / "log"
    command = ("pretrain", *TINY, f"--workdir={workdir}")
    for moment in KILLS[trial]:
        at_point = ":" in moment
        process = zygote().start(*command, log=log, **({"MAEJAX_FAULT": moment} if at_point else {}))
        if at_point:
            assert process.wait() == -9, process.text()
            continue
        if moment == "step 1":
            wait_for_line(workdir, process)
        time.sleep(rng.uniform(0, 2.0))
        process.kill()
        process.wait()
    process = zygote().start(*command, log=log)
    assert process.wait() == 0, process.text()
    assert_same_outcome(outcome(workdir), undisturbed)
    folder = workdir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {str(step) for step in sealed_steps(folder)}
    expected = expected_chain(num_examples=1438, seed=3, batch_size=16, steps=STEPS)
    assert read_meta(folder / str(STEPS))["ledger"] == expected  # no record twice, none left out


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(text) for thread in threads for text in thread.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_workers_neither_break_a_stop_nor_outlive_a_kill(tmp_path, undisturbed):
    """Ctrl-C reaches the whole process group, workers included; SIGKILL reaches only the run itself."""
    workdir = tmp_path / "run"
    process = start(workdir, "--config.data.workers=2")
    wait_for_line(workdir, process, 20)
    for worker in [process.pid, *children(process.pid)]:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM) if worker != process.pid else None
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out

    process = start(workdir, "--config.data.workers=2")
    while process.poll() is None and len(children(process.pid)) < 3:  # two workers and multiprocessing's tracker
        time.sleep(0.02)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    finish(workdir)
    assert_same_outcome(outcome(workdir), undisturbed)


def test_finished_runs_say_so_and_do_nothing(tmp_path):
    workdir = tmp_path / "run"
    finish(workdir)
    before = outcome(workdir)
    out = finish(workdir)
    assert f"resuming at step {STEPS}" in out and f"done      {workdir} at step {STEPS}" in out
    assert_same_outcome(outcome(workdir), before)


def test_workers_and_devices_may_change_on_the_way(tmp_path, undisturbed, monkeypatch):
    """Eight devices on the second half, with two worker processes: the same batches, so the same losses."""
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_line(workdir, process, 50)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    out = finish(workdir, "--config.data.workers=2", "--config.mesh.fsdp=2", "--config.sharding=fsdp")
    assert "data.workers changed from None to 2" in out and "data=4 x fsdp=2" in out
    losses, expected = (
        [line["train/loss"] for line in lines if "train/loss" in line] for _, lines in (outcome(workdir), undisturbed)
    )
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    np.testing.assert_allclose(losses[:60], expected[:60], rtol=1e-5)
