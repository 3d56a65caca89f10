"""Bad records among good ones: the others are untouched, what replaces them is a rule, and too many end the run."""

import json
import random
import shutil

import pytest
from bad_records import break_some, hold, make_images
from test_hooks import news, step_end

from maejax import hooks
from maejax.cli import main
from maejax.errors import TooManyBadImages


def test_one_in_a_hundred(tmp_path):
    numbers = hold(tmp_path / "images", random.Random(1), images=400, bad=4, epochs=3, workers=0)
    assert numbers == {"rows": 1200, "bad": 12}


def test_counts_are_the_same_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", 40, random.Random(0))
    causes = break_some(tmp_path / "images", 6, random.Random(0))
    flags = [
        "--config=pretrain_digits", "--config.data.source=images", "--config.evals=none", "--config.image_size=4",
        "--config.model.patch=2", "--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2",
        "--config.decoder.width=16", "--config.decoder.depth=1", "--config.decoder.heads=2", "--config.batch_size=16",
        "--config.steps=6", "--config.warmup_steps=0", "--config.save_steps=3", "--config.log_steps=1",
        "--config.tensorboard=false", "--config.data.max_bad_fraction=0.5", "--config.data.channels=3",
    ]  # fmt: skip
    assert main(["pretrain", *flags, "--workdir=whole"]) == 0
    shutil.copytree("whole", "resumed")
    shutil.rmtree("resumed/checkpoints/6")  # as after a kill between steps 3 and 6
    assert main(["pretrain", *flags, "--workdir=resumed"]) == 0
    assert (tmp_path / "whole/bad_images.jsonl").read_text() == (tmp_path / "resumed/bad_images.jsonl").read_text()
    listed = [json.loads(line) for line in (tmp_path / "whole/bad_images.jsonl").read_text().splitlines()]
    assert listed and all(causes[line["record"]] == line["cause"] for line in listed)
    for run in ("whole", "resumed"):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        for line in lines:
            counted = {key[9:]: value for key, value in line.items() if key.startswith("data/bad_")}
            before = [bad["cause"] for bad in listed if bad["step"] <= line["step"]]
            assert counted == {cause: before.count(cause) for cause in set(before)}
        body = (tmp_path / run / "checkpoints/6/manifest.json").read_bytes()[:-1].rpartition(b"\n")[0]
        everything = [bad["cause"] for bad in listed]
        assert json.loads(body)["meta"]["bad_images"] == {cause: everything.count(cause) for cause in set(everything)}


def steps_until_stopped(path, fraction, limit, *, steps, good_before=0, batch_size=200, seed=0):
    """The step at which a run is stopped whose records are bad at random, after so many good steps; None if never."""
    rng, counted = random.Random(seed), news()
    listed = hooks.ListBadImages(path, str, counted, batch_size=batch_size, max_fraction=limit)
    for step in range(1, steps + 1):
        count = 0 if step <= good_before else sum(rng.random() < fraction for _ in range(batch_size))
        end = step_end(step, faults=[(7, "corrupt")] * count)
        counted(end)
        try:
            listed(end)
        except TooManyBadImages as error:
            assert error.exit_code == 65 and "corrupt)" in str(error) and str(path) in str(error)
            return step
    return None


@pytest.mark.parametrize("limit, window", [(0.001, 100_000), (0.05, 10_000)])
def test_a_limit_is_never_reached_below_it_and_always_within_a_window_above(limit, window, tmp_path):
    path = tmp_path / "bad.jsonl"
    for seed in range(3):
        assert steps_until_stopped(path, limit / 2, limit, steps=3 * window // 200, seed=seed) is None
        above = steps_until_stopped(path, 2 * limit, limit, steps=window // 200, seed=seed)
        assert above is not None
        # A disk that begins to fail after many good records: the fraction of all of them stays small for long.
        late = steps_until_stopped(path, 2 * limit, limit, steps=3 * window // 200, good_before=2 * window // 200)
        assert late is not None and late > 2 * window // 200
