"""Numbers that go wrong: poisoned batches, spikes, rows of them, and bits that flip in one replica (rows 24 to 27)."""

import dataclasses
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import test_guard
import test_replicas
import test_rollback
from planted import flip

from maejax import build
from maejax import config as configs
from maejax.errors import SilentCorruption
from maejax.fingerprint import fingerprints
from maejax.guard import HORIZON
from maejax.mesh import make_mesh, to_global
from maejax.overrides import override
from maejax.program import make_program
from maejax.replicas import CompareReplicas
from maejax.tree import named_leaves, nest
from soak import Trial, campaign

jax.config.update("jax_num_cpu_devices", 8)  # before anybody asks for a device

TESTS = Path(__file__).parents[1]


# ---- Rows 24 and 25: one bad step -----------------------------------------------------------------------------------


@campaign(
    row=24, fault="NaN, an infinity or an overflow from one row of a batch, on one of 8 devices, at steps 0 to 200",
    promise="update skipped; weights, moments, average, statistics unchanged bit for bit; the next step as ever",
    trials=40, fast="test_guard.py",
)  # fmt: skip
def one_bad_batch(trial: Trial) -> None:
    """Against a run that never saw that batch."""
    at, row = [0, 1, 63, 64, 200][trial.number % 5], trial.rng.randrange(test_guard.B)
    bad = test_guard.batch_of(at, trial.rng.choice([np.nan, np.inf, -np.inf, 1e38]), slice(row, row + 1))
    step, state = test_guard.machine(name=trial.rng.choice(["adamw", "lars"]), accum=trial.rng.choice([1, 2]))
    clean = state
    for number in range(at + 4):
        state, metrics = step(state, bad if number == at else test_guard.batch_of(number))
        if number != at:
            clean, _ = step(clean, test_guard.batch_of(number))
    test_guard.assert_same_bits(test_guard.weights(state), test_guard.weights(clean))
    assert int(metrics["guard/skipped"]) == 1 and int(metrics["guard/in_a_row"]) == 0


@campaign(
    row=25, fault="a gradient 20 to 1,000,000 times its running mean; 1,000 times among the first hundred",
    promise="every one is skipped, and nothing else",
    trials=200, fast="test_guard.py",
)  # fmt: skip
def spikes(trial: Trial) -> None:
    """From just over the threshold on; the mean itself is compared with numpy in test_guard.py."""
    step, state = test_guard.machine()
    early, everything = trial.rng.randrange(HORIZON), slice(None)
    for number in range(HORIZON + trial.rng.randrange(50)):
        factor = 1000.0 if number == early else 1.0
        state, metrics = step(state, test_guard.batch_of(number + 1000 * trial.number, factor, everything))
    assert int(metrics["guard/skipped"]) == 0
    batch = test_guard.batch_of(10**7 + trial.number)
    _, metrics = step(state, batch)
    plain = float(metrics["train/grad_norm"])
    mean = math.exp(float(state.guard["log_norm"]))
    wanted = 20.01 * 10 ** trial.rng.uniform(0, 4.7)  # times the mean, from just over the threshold
    batch["factor"] = np.full_like(batch["factor"], wanted * mean / plain)
    after, metrics = step(state, batch)
    assert math.isclose(float(metrics["train/grad_norm"]), wanted * mean, rel_tol=1e-3)
    assert int(metrics["guard/skipped"]) == 1
    test_guard.assert_same_bits(test_guard.weights(after), test_guard.weights(state))


@functools.cache
def small_network(
    rate: float, size: int, decay: float | None = None, sharding: str = "zero1", seed: int = 0, devices: int = 8
):
    """The digits recipe with less of everything."""
    c = override(
        configs.load("pretrain_digits"),
        {
            "model.width": "32", "model.depth": "1", "model.heads": "2", "decoder.width": "16", "decoder.heads": "2",
            "base_lr": str(rate), "batch_size": str(size), "total_epochs": "None", "total_steps": "1000",
            "warmup_epochs": "None", "warmup_steps": "50", "optimizer.ema_decay": str(decay), "sharding": sharding,
            "seed": str(seed), "data.workers": "0",
        },
    )  # fmt: skip
    mesh, source = make_mesh(c.mesh, jax.devices()[:devices]), build.source_of(c)
    return c, mesh, source, make_program(c, mesh, num_examples=len(source), num_classes=None)


@campaign(
    row=25, fault="none: 1,000 steps of pretraining on digits, other seeds, rates and batches each",
    promise="no step is skipped (of 10,000, at most one)",
    trials=10, fast="",
)  # fmt: skip
def clean_steps_are_not_skipped(trial: Trial) -> dict[str, float]:
    """How near to the threshold a clean run comes."""
    rate, size = trial.rng.choice([5e-4, 2e-3, 8e-3]), trial.rng.choice([16, 32, 64])
    c, mesh, source, program = small_network(rate, size, seed=trial.number, devices=1)
    state, largest = program.new_state(), 0.0
    batches = build.training_batches(c, source, mesh, first_step=0)
    for number in range(1000):
        rows = next(batches)
        before = float(state.guard["log_norm"])
        batch = to_global({name: rows[name] for name in program.batch}, mesh)
        state, metrics = jax.block_until_ready(program.train_step(state, batch))
        if number >= HORIZON:
            largest = max(largest, float(metrics["train/grad_norm"]) / math.exp(before))
    assert int(metrics["guard/skipped"]) == 0
    return {"largest norm over its running mean": largest}


# ---- Row 26: several in a row ---------------------------------------------------------------------------------------


def a_poisoned_stream(rng: random.Random, windows: int) -> tuple[dict[int, int], list[dict[str, int]]]:
    """{batch: color} of rows of three bad batches, and the rollbacks that follow: by counting, with a save every 8."""
    bad, records, batch, ahead = {}, [], 0, 0
    for _ in range(windows):
        begin = batch + rng.randint(2, 9)
        bad |= dict.fromkeys(range(begin, begin + 3), rng.choice([255, 254]))
        batch = begin + 2
        at = batch - ahead
        to = (at - 3) // 8 * 8 or (at - 1) // 8 * 8  # rather one among the skipped steps than none
        ahead = batch - to
        records.append({"at": at, "to": to, "offset": ahead})
    return bad, records


def start(folder: Path, poison: str, *flags: str) -> subprocess.Popen[str]:
    """`maejax pretrain` of test_rollback's run, on fewer devices than here."""
    settings = [f"--config.{key}={value}" for key, value in (test_rollback.RUN | {"total_steps": "40"}).items()]
    command = [sys.executable, "-m", "maejax", "pretrain", "--config=pretrain_digits", *settings, *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "POISON": poison}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, f"--workdir={folder}"], env=env, **pipes)


def noted(folder: Path) -> list[dict[str, int]]:
    """The rollbacks of a run."""
    return json.loads((folder / "rollbacks.json").read_text())


@campaign(
    row=26, fault="one to three rows of bad batches, each as long as the limit; SIGKILL at two random moments",
    promise="back to the last good checkpoint and past those batches; killed, it ends with the same numbers",
    trials=20, fast="test_rollback.py",
)  # fmt: skip
def rows_of_bad_batches(trial: Trial) -> dict[str, float]:
    """One run in peace and one that is killed, against each other and against rollbacks counted by hand."""
    bad, records = a_poisoned_stream(trial.rng, trial.rng.randint(1, 3))
    poison = test_rollback.poison(bad, trial.rng.randrange(test_rollback.BATCH))
    calm, killed = trial.folder / "calm", trial.folder / "killed"
    began = time.monotonic()
    out, _ = (process := start(calm, poison, "--fake-devices=2")).communicate(timeout=300)
    took = time.monotonic() - began
    assert process.returncode == 0, out
    assert noted(calm) == records
    for _ in range(2):
        process = start(killed, poison, "--fake-devices=2")
        time.sleep(trial.rng.uniform(0.3, 1) * took)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, _ = (process := start(killed, poison, "--fake-devices=2")).communicate(timeout=300)
    assert process.returncode == 0, out
    assert noted(killed) == records
    assert test_rollback.numbers(killed) == test_rollback.numbers(calm)
    assert test_rollback.lines(killed / "skipped.jsonl") == test_rollback.lines(calm / "skipped.jsonl")
    return {"rollbacks": len(records)}


@campaign(
    row=26, fault="a fourth row of bad batches, whose bad rows are on one of two processes",
    promise="three rollbacks, then exit code 70 on both processes, of the same step and for the same reason",
    trials=10, fast="",
)  # fmt: skip
def the_fourth_row_ends_it_on_all(trial: Trial) -> None:
    """With guard.max_rollbacks as it is by default."""
    bad, records = a_poisoned_stream(trial.rng, 4)
    poison = test_rollback.poison(bad, trial.rng.randrange(test_rollback.BATCH))
    folder = trial.folder / "run"
    out, _ = (process := start(folder, poison, "--fake-processes=2", "--fake-devices=1")).communicate(timeout=300)
    assert process.returncode == 70, out
    assert noted(folder) == records[:3]
    said = f"at step {records[3]['at']}, and 3 steps in a row were skipped, after 3 rollbacks"
    assert out.count(said) == 2, out
    batches = [[line["batch"] for line in test_rollback.lines(folder / f"skipped{n}.jsonl")] for n in ("", ".1")]
    assert batches == [list(bad), list(bad)]


# ---- Row 27: replicas -----------------------------------------------------------------------------------------------


@functools.cache
def replicas():
    """A state after two steps, whole on 8 devices; its leaves; and the comparison."""
    c, mesh, source, program = small_network(2e-3, 16, decay=0.9, sharding="replicate")
    state, batches = program.new_state(), build.training_batches(c, source, mesh, first_step=0)
    for _ in range(2):
        rows = next(batches)
        batch = to_global({name: rows[name] for name in program.batch}, mesh)
        state, _ = jax.block_until_ready(program.train_step(state, batch))
    compare = CompareReplicas(program.shapes, mesh, every=1)
    compare.now(test_replicas.end(state))
    return state, {part: named_leaves(getattr(state, part)) for part in ("params", "ema")}, compare


@campaign(
    row=27, fault="one bit flipped in one of 8 devices' copy: any leaf, element, bit and device",
    promise="found at the next comparison, which names the leaf, the process and the device",
    trials=1000, fast="test_replicas.py",
)  # fmt: skip
def flipped_bits_of_one_device(trial: Trial) -> None:
    """Planted into weights or their average."""
    state, parts, compare = replicas()
    part = trial.rng.choice(sorted(parts))
    name = trial.rng.choice(sorted(parts[part]))
    leaf, device = parts[part][name], trial.rng.choice(jax.devices())
    broken = flip(leaf, device, trial.rng.randrange(leaf.size), trial.rng.randrange(8 * leaf.dtype.itemsize))
    tree = nest(parts[part] | {name: broken})
    try:
        compare.now(test_replicas.end(dataclasses.replace(state, **{part: tree})))
    except SilentCorruption as error:
        assert f"{part}/{name} on process 0, device {device.id} (cpu). " in str(error), error
    else:
        raise AssertionError(f"{part}/{name} on {device} was not found")


@campaign(
    row=27, fault="none: 1,000 comparisons, a step between any two; the same fingerprints on other meshes",
    promise="no false alarm",
    trials=10, fast="test_replicas.py",
)  # fmt: skip
def no_false_alarm(trial: Trial) -> None:
    """With weights that change from each to the next."""
    c, mesh, source, program = small_network(2e-3, 16, decay=0.9, sharding="replicate")
    compare = CompareReplicas(program.shapes, mesh, every=1)
    state = program.new_state()
    rows = next(build.training_batches(c, source, mesh, first_step=trial.number))
    batch = to_global({name: rows[name] for name in program.batch}, mesh)
    for step in range(1, 1001):
        state, _ = jax.block_until_ready(program.train_step(state, batch))
        compare(test_replicas.end(state, step))
    compare.settle()
    expected = named_leaves(jax.jit(fingerprints)(state.params))
    alone = named_leaves(jax.jit(fingerprints)(jax.device_put(state.params, jax.devices()[trial.number % 8])))
    split = small_network(2e-3, 16, decay=0.9, sharding="zero1")[3].shapes.params
    spread = jax.device_put(state.params, jax.tree.map(lambda leaf: leaf.sharding, split))
    there = named_leaves(jax.jit(fingerprints)(spread))
    assert all(int(expected[name]) == int(alone[name]) == int(there[name]) for name in expected)
