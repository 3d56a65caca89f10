"""Poisoned data: what is skipped, what is undone, and that a run that was killed on the way sees the same stream."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maejax import config as configs
from maejax import train as training
from maejax.checkpoint import Checkpoints
from maejax.data.batches import stream_seed
from maejax.errors import Diverged
from maejax.ledger import expected_chain
from maejax.manifest import read_meta, sealed_steps
from maejax.overrides import override
from maejax.prepare import plan
from maejax.rollback import Rollbacks, offset, segments

STEPS, BATCH = 24, 16
RUN = {
    "total_epochs": "None", "total_steps": str(STEPS), "warmup_epochs": "None", "batch_size": str(BATCH),
    "model.width": "32", "model.depth": "1", "model.heads": "2", "decoder.width": "16", "decoder.heads": "2",
    "log_steps": "1", "save_steps": "8", "evals": "", "tensorboard": "false", "keep_checkpoints": "9",
    "data.source": "poison:Digits", "objective": "poison:Upset", "guard.in_a_row": "3", "data.workers": "0",
}  # fmt: skip


def stream(count):
    """The records of the first batches (count b), by the rule that `batches` states for small sets."""
    epochs = range(count * BATCH // 1438 + 1)
    order = np.concatenate([np.random.default_rng(stream_seed(0) + epoch).permutation(1438) for epoch in epochs])
    return order[: count * BATCH].reshape(count, BATCH)


def poison(batches, row=BATCH - 1):
    """What the variable must be for these batches of the stream, counted from 1: {batch: color}."""
    records = stream(max(batches))
    return ",".join(f"{records[batch - 1, row]}:{color}" for batch, color in batches.items())


def run(workdir, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    training.train(plan(override(configs.load("pretrain_digits"), RUN | changes), workdir))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def numbers(workdir):
    """What was logged, but for times."""
    kept = [
        {k: v for k, v in line.items() if k.startswith(("train/", "guard/"))}
        for line in lines(workdir / "metrics.jsonl")
    ]
    return [repr(sorted(line.items())) for line in kept]  # as text, in which NaN is NaN


def test_the_stream_of_a_step():
    assert offset([], 5) == 0 and list(segments([], 3, 9)) == [(3, 9, 0)] and list(segments([], 9, 9)) == []
    once = [{"at": 100, "to": 50, "offset": 50}]
    assert [offset(once, step) for step in (50, 51, 200)] == [0, 50, 50]
    assert list(segments(once, 40, 60)) == [(40, 50, 0), (50, 60, 50)]
    # The checkpoint of step 50 was damaged: the next rollback goes further back, and counts from where it was.
    twice = [*once, {"at": 120, "to": 40, "offset": 130}]
    assert [offset(twice, step) for step in (40, 41, 60)] == [0, 130, 130]
    later = [*once, {"at": 120, "to": 110, "offset": 60}]
    assert list(segments(later, 0, 130)) == [(0, 50, 0), (50, 110, 50), (110, 130, 60)]


# A single bad batch; three in a row, steps 10 to 12: back to 8 and on with batch 13; three more, steps 13 to 15, where
# batches 17 to 19 are: back again, and on with batch 20; and a single one of another kind.
BAD = {5: 255, 10: 255, 11: 255, 12: 255, 17: 255, 18: 255, 19: 255, 24: 254}
ROLLBACKS = [{"at": 12, "to": 8, "offset": 4}, {"at": 15, "to": 8, "offset": 11}]


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gone_back") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISON", poison(BAD))
        run(workdir)
    return workdir


def test_what_is_skipped_is_listed_and_several_in_a_row_are_undone(gone_back):
    assert json.loads((gone_back / "rollbacks.json").read_text()) == ROLLBACKS
    records, listed = stream(24), lines(gone_back / "skipped.jsonl")
    steps = [5, 10, 11, 12, 13, 14, 15, 13]
    assert [(line["step"], line["batch"]) for line in listed] == list(zip(steps, BAD, strict=True))
    assert [line["loss"] for line in listed] == ["nan"] * 7 + ["inf"]
    for line in listed:
        assert line["records"] == records[line["batch"] - 1].tolist() and line["reason"] == "not finite"
    logged = lines(gone_back / "metrics.jsonl")  # of what stands; the list has the rest
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert [line["guard/skipped"] for line in logged] == [0] * 4 + [1] * 8 + [2] * 12
    assert sealed_steps(gone_back / "checkpoints") == [8, 16, 24]
    text = (gone_back / "train.log").read_text()
    assert "step 12: 3 steps in a row were skipped; going back to step 8, with the data that follows" in text
    meta = read_meta(gone_back / "checkpoints" / str(STEPS))
    assert meta["ledger"] == expected_chain(
        num_examples=1438, seed=0, batch_size=BATCH, steps=STEPS, offset=lambda step: offset(ROLLBACKS, step)
    )
    assert "step 5: skipped, the loss is nan; skipped.jsonl lists its records" in text and "skipped 2" in text


def test_who_knows_of_the_rollbacks_sees_the_same_stream(gone_back, tmp_path, monkeypatch):
    monkeypatch.setenv("POISON", poison(BAD))
    (tmp_path / "config.json").write_text((gone_back / "config.json").read_text())
    (tmp_path / "rollbacks.json").write_text((gone_back / "rollbacks.json").read_text())
    run(tmp_path)
    assert numbers(tmp_path) == numbers(gone_back)


def test_killed_between_the_note_and_what_follows_it(gone_back, tmp_path, monkeypatch):
    monkeypatch.setenv("POISON", poison(BAD))
    with monkeypatch.context() as patch:
        patch.setattr("maejax.rollback.Rollbacks._drop_abandoned", lambda self: self.records and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, save_steps="4")
    assert json.loads((tmp_path / "rollbacks.json").read_text()) == ROLLBACKS[:1]
    # A checkpoint from the time before, as one that was being written: of a step that was undone.
    shutil.copytree(tmp_path / "checkpoints" / "8", tmp_path / "checkpoints" / "12")
    run(tmp_path, save_steps="8")
    assert "resuming at step 8" in (tmp_path / "train.log").read_text()
    assert numbers(tmp_path) == numbers(gone_back)
    assert lines(tmp_path / "skipped.jsonl") == lines(gone_back / "skipped.jsonl")
    # Lost, the list is taken from a checkpoint.
    (tmp_path / "rollbacks.json").unlink()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, say=print)
    assert Rollbacks(checkpoints, limit=3, in_a_row=3, say=print).records == ROLLBACKS
    checkpoints.close()


def test_without_a_checkpoint_it_begins_again_and_at_last_gives_up(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    monkeypatch.setenv("POISON", poison(dict.fromkeys(range(1, 12), 255)))
    with pytest.raises(
        Diverged, match=r"the loss is nan at step 3, and 3 steps in a row were skipped, after 2 rollbacks"
    ):
        run(workdir, guard__max_rollbacks="2")
    records = [{"at": 3, "to": 0, "offset": 3}, {"at": 3, "to": 0, "offset": 6}]
    assert json.loads((workdir / "rollbacks.json").read_text()) == records
    # Asked for more, the same run goes on where its data were: batches 7, 8, 9, and 10, 11, then good ones.
    run(workdir, guard__max_rollbacks="3")
    assert json.loads((workdir / "rollbacks.json").read_text()) == [*records, {"at": 3, "to": 0, "offset": 9}]
    assert [line["batch"] for line in lines(workdir / "skipped.jsonl")] == list(range(1, 12))
    assert lines(workdir / "metrics.jsonl")[-1]["guard/skipped"] == 2


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path):
    """One row of one process is bad: both go back, both give up, with the same code."""
    flags = [f"--config.{key}={value}" for key, value in RUN.items()]
    command = [
        sys.executable, "-m", "maejax", "pretrain", "--config=pretrain_digits", *flags, f"--workdir={tmp_path / 'run'}",
        "--fake-processes=2", "--fake-devices=2", "--config.guard.max_rollbacks=1",
    ]  # fmt: skip
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here.parent}:{here}",
        "POISON": poison(BAD),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 70, done.stdout + done.stderr
    assert done.stderr.count("the loss is nan at step 15, and 3 steps in a row were skipped, after 1 rollbacks") == 2
    assert json.loads((tmp_path / "run" / "rollbacks.json").read_text()) == [{"at": 12, "to": 8, "offset": 4}]
    rows, bad = stream(19), list(BAD)[:7]
    for name, part in (("skipped.jsonl", slice(0, 8)), ("skipped.1.jsonl", slice(8, 16))):
        listed = lines(tmp_path / "run" / name)
        assert [line["batch"] for line in listed] == bad
        assert [line["records"] for line in listed] == [rows[b - 1, part].tolist() for b in bad]
