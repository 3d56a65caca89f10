"""Hooks and metrics: what is written, when, and what stops a run."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from maejax import hooks
from maejax.errors import SilentCorruption, TooManyBadImages
from maejax.interruption import Interruption, News, StepEnd
from maejax.metrics import Console, JsonLines, TensorBoard, WeightsAndBiases, cut_json_lines, duration
from maejax.state import TrainState

STATE = TrainState(step=0, params={}, opt_state={}, ema={}, stats={})


def step_end(step, loss=1.0, grad_norm=1.0, faults=()):
    metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": 0.1}
    return StepEnd(
        step=step, state=STATE, metrics={k: jnp.float32(v) for k, v in metrics.items()}, data_wait=0.0, faults=faults
    )


class Memory:
    def __init__(self):
        self.lines, self.images = [], []

    def scalars(self, step, values):
        self.lines.append({"step": step} | values)

    def image(self, step, name, image):
        self.images.append((step, name))

    def close(self):
        pass


def news(**bad_images):
    return News(Interruption(), bad_images=bad_images)


def logger(writer, every=2, total=5, news=None):
    return hooks.LogMetrics(
        [writer], Console(quiet=True), every=every, total_steps=total, first_step=0, batch_size=8, num_examples=16,
        flops_per_image=lambda step: 1e9, news=news or globals()["news"](),
    )  # fmt: skip


def test_lines_come_every_n_steps_and_at_the_end():
    writer = Memory()
    log = logger(writer)
    for step in range(1, 6):
        log(step_end(step, loss=step))
    log.flush()
    assert [line["step"] for line in writer.lines] == [2, 4, 5]
    assert [line["train/loss"] for line in writer.lines] == [2, 4, 5]
    # Speed is that of finished steps: at the end of step 2 nothing but step 1, which compiles, is sure to be finished.
    assert "perf/img_per_sec" not in writer.lines[0]
    assert all(line["perf/img_per_sec"] > 0 for line in writer.lines[1:])
    last = writer.lines[1]
    assert last["progress/examples"] == 32 and last["progress/epoch"] == 2
    assert last["perf/img_per_sec"] == pytest.approx(8 / last["perf/step_time"])
    assert 0 <= last["perf/data_wait"] <= 1


def test_numbers_of_a_line(capsys):
    log = hooks.LogMetrics(
        [], Console(), every=1, total_steps=4, first_step=0, batch_size=8, num_examples=16, flops_per_image=None,
        news=news(empty=3),
    )  # fmt: skip
    for step in (1, 2, 3):
        log(step_end(step, loss=0.1234567))
    log.flush()
    line = capsys.readouterr().out.splitlines()[-1]
    for text in ("step 3/4 75%", "loss 0.1235", "lr 1.00e-01", "|g| 1", "img/s ", "/dev)", "data 0%", "bad 3", "eta "):
        assert text in line, line


def test_a_state_that_does_not_pass_the_check_is_not_saved():
    class Never:
        def save(self, *_):
            raise AssertionError("saved")

    def check(end):
        raise SilentCorruption("replicas differ")

    log = logger(Memory(), every=100)
    save = hooks.SaveCheckpoint(Never(), log, news(), every=1, total_steps=9, meta={}, check=check)
    with pytest.raises(SilentCorruption):
        save(step_end(1))


def test_what_is_saved_was_logged_before_and_carries_the_counts():
    events, writer = [], Memory()

    class Recorder:
        def save(self, state, meta, *, wait):
            events.append((len(writer.lines), meta["bad_images"], wait))
            assert meta == {"data": "id", "bad_images": meta["bad_images"], "ledger": counted.ledger.chain}

    counted = news()
    log = logger(writer, every=1, news=counted)
    save = hooks.SaveCheckpoint(
        Recorder(), log, counted, every=2, total_steps=3, meta={"data": "id"}, check=lambda end: None
    )
    for step in (1, 2, 3):
        end = step_end(step, faults=[(7, "empty")])
        for hook in (counted, log, save):
            hook(end)
    assert events == [(2, {"empty": 2}, False), (3, {"empty": 3}, True)]  # the last one may take as long as it must


def test_a_save_that_failed_beside_the_loop_is_told_at_the_next_step():
    events, broken = [], [False]

    class Failing:
        def save(self, state, meta, *, wait):
            events.append("save")

        def wait(self):
            events.append("told")

    heard = News(Interruption(), bad_images={}, failing=lambda: broken[0])
    save = hooks.SaveCheckpoint(
        Failing(),
        logger(Memory(), every=9, news=heard),
        heard,
        every=9,
        total_steps=9,
        meta={},
        check=lambda end: None,
    )
    for step in (1, 2, 3):
        broken[0] = step == 2
        for hook in (heard, save):
            hook(step_end(step))
        events.append(step)
    assert events == [1, "told", 2, 3]


def test_bad_images_are_listed_counted_and_at_last_too_many(tmp_path):
    counted = news(empty=48)  # 50 of the first thousand are allowed
    listed = hooks.ListBadImages(
        tmp_path / "bad_images.jsonl", lambda i: f"image {i}", counted, batch_size=8, max_fraction=0.05
    )

    def bad(end):
        counted(end)
        listed(end)

    bad(step_end(1, faults=[(3, "truncated"), (4, "empty")]))
    lines = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "record": 3, "name": "image 3", "cause": "truncated"} and len(lines) == 2
    with pytest.raises(TooManyBadImages, match="51 of 16 records could not be read .49 empty, 2 truncated|.50 empty"):
        bad(step_end(2, faults=[(4, "empty")]))


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    for step in (5, 10, 15):
        writer.scalars(step, {"train/loss": 0.1 * step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 20, "train/lo')  # a kill in the middle of a line
    cut_json_lines(path, 10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]
    cut_json_lines(tmp_path / "nosuch.jsonl", 3)


def test_tensorboard_files_can_be_read_back(tmp_path):
    writer = TensorBoard(tmp_path, 0)
    writer.scalars(3, {"train/loss": 0.5})
    writer.image(3, "reconstruction", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    (file,) = tmp_path.iterdir()
    assert b"train/loss" in file.read_bytes() and b"reconstruction" in file.read_bytes()


def test_console_keeps_a_log(tmp_path, capsys):
    console = Console(tmp_path / "train.log")
    console.say("one\ntwo")
    console.progress("step 1")
    console.close()
    assert capsys.readouterr().out == "one\ntwo\nstep 1\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "two", "step 1"]


@pytest.mark.parametrize("seconds, text", [(5, "5s"), (200, "3m20s"), (18_720, "5h12m"), (183_600, "2d03h")])
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_memory_is_measured():
    assert 1e7 < hooks.host_memory() < 1e12


def test_weights_and_biases_gets_everything_and_is_resumed(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: "abc123"),
        init=lambda **kwargs: calls.append(("init", kwargs["id"], kwargs["resume"])),
        log=lambda values, step: calls.append(("log", step, values)),
        Image=lambda image: image.shape,
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = WeightsAndBiases(tmp_path, {"seed": 0})
        writer.scalars(5, {"train/loss": 0.5})
        writer.image(5, "reconstruction", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    assert calls[:4] == [
        ("init", "abc123", "allow"),
        ("log", 5, {"train/loss": 0.5}),
        ("log", 5, {"reconstruction": (4, 6, 3)}),
        ("finish",),
    ]
    assert calls[4] == ("init", "abc123", "allow")
