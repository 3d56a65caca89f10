"""Poisoned data: what is skipped, what is undone, and that a run that was killed on the way sees the same stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maejax import config as configs
from maejax import train as training
from maejax.checkpoint import sealed_steps
from maejax.data.pipeline import stream_seed
from maejax.errors import Diverged
from maejax.overrides import override
from maejax.prepare import plan
from maejax.rollback import offset, segments

STEPS, BATCH = 24, 16
RUN = {
    "total_epochs": "None", "total_steps": str(STEPS), "warmup_epochs": "None", "batch_size": str(BATCH),
    "model.width": "32", "model.depth": "1", "model.heads": "2", "decoder.width": "16", "decoder.heads": "2",
    "log_steps": "1", "save_steps": "8", "evals": "", "tensorboard": "false", "keep_checkpoints": "9",
    "data.source": "poison:Digits", "objective": "poison:Upset", "guard.in_a_row": "3", "data.workers": "0",
}  # fmt: skip


def stream(count):
    """The records of the first batches (count b), by the rule that the pipeline states."""
    import grain

    order = grain.MapDataset.range(1438).seed(stream_seed(0)).shuffle().repeat()
    return np.array([[order[batch * BATCH + row] for row in range(BATCH)] for batch in range(count)])


def poison(batches, color=255, row=BATCH - 1):
    """What the variable must be for these batches of the stream, counted from 1."""
    records = stream(max(batches, default=0))
    return ",".join(f"{records[batch - 1, row]}:{color}" for batch in batches)


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


def test_single_bad_batches_are_skipped_and_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("POISON", f"{poison([1, 6])},{poison([11], 254)}")
    run(tmp_path / "run")
    records = stream(11)
    listed = lines(tmp_path / "run" / "skipped.jsonl")
    assert [line["step"] for line in listed] == [line["batch"] for line in listed] == [1, 6, 11]
    assert [line["loss"] for line in listed] == ["nan", "nan", "inf"]
    for line in listed:
        assert line["records"] == records[line["step"] - 1].tolist() and line["reason"] == "not finite"
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["guard/skipped"] for line in logged] == [1] * 5 + [2] * 5 + [3] * 14
    assert sealed_steps(tmp_path / "run" / "checkpoints") == [8, 16, 24]
    assert "skipped 3" in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / "rollbacks.json").exists()


def test_several_in_a_row_go_back_and_past_them(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    # Three in a row end at step 12: back to 8, and from batch 13 on. Batches 17 to 19 are steps 13 to 15: back again.
    monkeypatch.setenv("POISON", poison([10, 11, 12, 17, 18, 19]))
    run(workdir)
    assert json.loads((workdir / "rollbacks.json").read_text()) == [
        {"at": 12, "to": 8, "offset": 4}, {"at": 15, "to": 8, "offset": 11},
    ]  # fmt: skip
    listed = lines(workdir / "skipped.jsonl")
    assert [(line["step"], line["batch"]) for line in listed] == [
        (10, 10), (11, 11), (12, 12), (13, 17), (14, 18), (15, 19),
    ]  # fmt: skip
    logged = lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert all(line["guard/skipped"] == 0 for line in logged)  # of what stands; the list has the rest
    assert sealed_steps(workdir / "checkpoints") == [8, 16, 24]

    # A run that knows of the rollbacks from the start, as one that was killed, sees that very stream.
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text((workdir / "config.json").read_text())
    (again / "rollbacks.json").write_text((workdir / "rollbacks.json").read_text())
    run(again)
    assert numbers(again) == numbers(workdir)
    text = (workdir / "train.log").read_text()
    assert "step 12: 3 steps in a row were skipped; going back to step 8, with the data that follows" in text


def test_without_a_checkpoint_it_begins_again_and_at_last_gives_up(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    monkeypatch.setenv("POISON", poison(range(1, 12)))
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


def test_checkpoints_of_undone_steps_are_never_used(tmp_path, monkeypatch):
    """Killed between the note of a rollback and all that follows it: the same as one that was not."""
    workdir, killed = tmp_path / "run", tmp_path / "killed"
    monkeypatch.setenv("POISON", poison([9, 10, 11]))
    run(workdir, save_steps="5")
    assert json.loads((workdir / "rollbacks.json").read_text()) == [{"at": 11, "to": 5, "offset": 6}]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("maejax.rollback.Rollbacks._drop_abandoned", lambda self: self.records and die())
    with pytest.raises(KeyboardInterrupt):
        run(killed, save_steps="5")
    assert sealed_steps(killed / "checkpoints") == [5, 10]
    monkeypatch.undo()
    monkeypatch.setenv("POISON", poison([9, 10, 11]))
    run(killed, save_steps="5")
    assert numbers(killed) == numbers(workdir)
    # Lost, the list is taken from a checkpoint.
    (killed / "rollbacks.json").unlink()
    run(killed, save_steps="5")
    assert "resuming at step 24" in (killed / "train.log").read_text()


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
        "POISON": poison([10, 11, 12, 17, 18, 19]),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 70, done.stdout + done.stderr
    assert done.stderr.count("the loss is nan at step 15, and 3 steps in a row were skipped, after 1 rollbacks") == 2
    assert json.loads((tmp_path / "run" / "rollbacks.json").read_text()) == [{"at": 12, "to": 8, "offset": 4}]
    rows = stream(19)
    for name, part in (("skipped.jsonl", slice(0, 8)), ("skipped.1.jsonl", slice(8, 16))):
        listed = lines(tmp_path / "run" / name)
        assert [line["batch"] for line in listed] == [10, 11, 12, 17, 18, 19]
        assert [line["records"] for line in listed] == [rows[b - 1, part].tolist() for b in (10, 11, 12, 17, 18, 19)]
