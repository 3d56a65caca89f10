"""Several real processes on this machine, over gloo: the same run as one process, stopped and resumed on others."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
STEPS, SAVED = 20, 8
RUN = (
    "--config=pretrain_digits", "--config.total_epochs=None", f"--config.total_steps={STEPS}",
    "--config.warmup_epochs=None", "--config.warmup_steps=4", "--config.batch_size=32", "--config.model.width=32",
    "--config.model.depth=2", "--config.decoder.width=16", "--config.log_steps=1", f"--config.save_steps={SAVED}",
    "--config.evals=knn", "--config.eval_images=64", "--config.tensorboard=false",
)  # fmt: skip


def environment(**more):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MAEJAX_", "OMPI_"))}
    return clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)} | more


def start(workdir, *flags, **env):
    command = [sys.executable, "-m", "maejax", "pretrain", *RUN, f"--workdir={workdir}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**env), **pipes)


def finish(process, code=0):
    out, _ = process.communicate(timeout=400)
    assert process.returncode == code, out
    return out


def metrics(workdir):
    """Every logged number of every step that is not about speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(("train/", "progress/", "eval/")):
                kept[name, line["step"]] = value
    return kept


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        # Gradients add up in another order; an evaluation may see a neighbor change places.
        tolerance = {"abs": 0.04} if name[0].startswith("eval/") else {"rel": 1e-5}
        assert left[name] == pytest.approx(right[name], **tolerance), name


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def several(workdir, count, *flags, each=lambda process: ()):
    """`count` processes that find each other by flags."""
    port = free_port()
    return [
        start(
            workdir, f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--process-id={process}",
            "--fake-devices=1", *flags, *each(process),
        )
        for process in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir, "--fake-devices=1"))
    got = metrics(workdir)
    assert got["train/loss", STEPS] < 0.95 * got["train/loss", 1]
    return got


def test_two_processes_compute_what_one_does(alone, tmp_path):
    out = finish(start(tmp_path / "run", "--fake-processes=2", "--fake-devices=2"))
    assert "processes 2, found by MAEJAX_*, coordinator 127.0.0.1:" in out
    assert "mesh      data=4 x fsdp=1 x tensor=1, zero1, 4 cpu devices" in out
    assert "batch     32 = 2 processes x 2 devices x 8 per device x 1 accumulation" in out
    assert out.count("done ") == 1  # process 0 speaks alone
    assert_same(metrics(tmp_path / "run"), alone)


@pytest.mark.slow
def test_saved_in_four_resumed_in_one_and_two(alone, tmp_path):
    # Parameters and moments are split over processes: every one writes its own part, and reads another.
    split = ("--config.sharding=fsdp", "--config.mesh.fsdp=4", "--config.mesh.data=-1")
    finish(start(tmp_path / "four", "--fake-processes=4", "--fake-devices=1", *split))
    assert_same(metrics(tmp_path / "four"), alone)
    for step in (16, STEPS):
        shutil.rmtree(tmp_path / "four" / "checkpoints" / str(step))
    for processes, flags in (
        (1, ("--config.mesh.fsdp=1", "--config.sharding=zero1")),
        (2, ("--config.mesh.fsdp=2", "--config.sharding=fsdp")),
    ):
        workdir = tmp_path / str(processes)
        shutil.copytree(tmp_path / "four", workdir)
        out = finish(start(workdir, f"--fake-processes={processes}", "--fake-devices=2", *flags))
        assert f"resuming at step {SAVED}" in out
        assert_same(metrics(workdir), alone)


def test_a_signal_to_one_stops_all_at_the_same_step(alone, tmp_path):
    workdir = tmp_path / "run"
    processes = several(workdir, 2, "--config.keep_checkpoints=9")
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_bytes().count(b"\n"):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    out = [finish(process, 75) for process in processes]
    step = int(out[1].split("SIGTERM: saved step ")[1].split(";")[0])
    assert f"a signal to another process: saved step {step};" in out[0]
    assert (workdir / "checkpoints" / str(step) / "manifest.json").exists() and step < STEPS
    finish(start(workdir, "--fake-devices=1"))
    assert_same(metrics(workdir), alone)


def test_a_save_that_fails_on_one_fails_on_all_and_the_next_works(alone, tmp_path):
    workdir = tmp_path / "run"
    faults = {"MAEJAX_FAULT": "save.write:1:1:raise=EIO"}
    out = finish(start(workdir, "--fake-processes=2", "--fake-devices=1", **faults))
    warning = "warning: a checkpoint could not be written (process 1: Input/output error: save.write); going on"
    assert out.count(warning) == 1 and "Traceback" not in out
    lines = [line for line in out.splitlines() if line.startswith(("step ", warning))]
    assert lines.index(warning) < len(lines) - 1  # told while it trained
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [16, STEPS]
    assert_same(metrics(workdir), alone)


def test_processes_that_were_started_differently_are_told(tmp_path):
    processes = several(tmp_path / "run", 2, each=lambda process: (f"--config.seed={process}",))
    for process in processes:
        out = finish(process, 2)
        assert "maejax: processes were started differently: seed is 0 on process 0, 1 on process 1" in out
        assert "Traceback" not in out
    assert not (tmp_path / "run" / "config.json").exists()


# ---- Batches --------------------------------------------------------------------------------------------------------


def gathered(out, first, last, *flags, processes=1, devices=1):
    port = free_port()
    env = {"MAEJAX_COORDINATOR": f"127.0.0.1:{port}", "MAEJAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, str(HERE / "gathered.py"), str(out), str(first), str(last), *flags]
    children = [
        subprocess.Popen(
            command, env=environment(**env, MAEJAX_PROCESS_ID=str(process), JAX_NUM_CPU_DEVICES=str(devices))
        )
        for process in range(processes)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * processes
    with np.load(out) as found:
        return dict(found)


def test_global_batches_are_the_same_arrays_in_the_same_order(tmp_path):
    # Batches of 400 of 1,438 images: an epoch ends inside step 4.
    flags = ("--config.batch_size=400", "--config.total_steps=6")
    alone = gathered(tmp_path / "1.npz", 0, 6, *flags)
    assert len(alone) == 6 * 4  # images, both parts of the mask, labels
    two = gathered(tmp_path / "2.npz", 0, 6, *flags, processes=2, devices=4)
    four = gathered(tmp_path / "4.npz", 2, 6, *flags, "--config.mesh.fsdp=2", processes=4, devices=1)
    for name, expected in alone.items():
        np.testing.assert_array_equal(two[name], expected, err_msg=name)
        key, _, step = name.rpartition("-")
        if int(step) >= 2:
            np.testing.assert_array_equal(four[f"{key}-{int(step) - 2}"], expected, err_msg=name)
