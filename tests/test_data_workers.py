"""Workers that are killed, crash or hang: the batches are those of a run without them, and a bad record has a cause."""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice

import numpy as np
import pytest

from maejax.data.desk import Unusable
from maejax.data.pipeline import train_batches
from maejax.data.transforms import Augment, read_faults
from maejax.errors import WorkersDied

AUGMENT = Augment(size=(8, 8))


class Trapped:
    """64 images, of which some sleep, sleep without letting go of Python's lock, kill their reader, or crash it."""

    num_classes = None

    def __init__(self, traps=(), always=None, note=None):
        self.traps, self.always, self.note = dict(traps), always, note

    def __len__(self):
        return 64

    def __getitem__(self, index):
        kind = self.traps.get(index, self.always)
        if kind and self.note:  # when it began
            with open(self.note, "a") as file:
                file.write(f"{time.time()}\n")
        if kind == "sleep":
            time.sleep(1000)
        elif kind == "hold":
            ctypes.PyDLL(None).sleep(1000)
        elif kind == "segv":
            ctypes.string_at(0)
        elif kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": np.full((8, 8, 3), index, np.uint8)}

    def name(self, index):
        return f"image-{index}"

    def fingerprint(self):
        return "0" * 16


def stream(source, **options):
    defaults = dict(channels=3, max_pixels=100, batch_size=4, seed=3)
    return train_batches(source, [AUGMENT], **(defaults | options))


def same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def replaced(batches, clean, record, cause):
    """The same rows but those of `record`, which has another image and the cause."""
    hits = 0
    for got, expected in zip(batches, clean, strict=True):
        bad = expected["index"] == record
        hits += bad.sum()
        np.testing.assert_array_equal(got["index"][~bad], expected["index"][~bad])
        np.testing.assert_array_equal(got["image"][~bad], expected["image"][~bad])
        faults = read_faults(got["faults"])  # a replacement may be the very same record, and then another is drawn
        assert set(faults) == {(record, cause)} if bad.any() else not faults
        assert len(faults) >= bad.sum()
    return hits


def test_a_killed_worker_is_replaced_and_the_order_kept():
    said = []
    running = stream(Trapped(), workers=2, say=said.append)
    got = list(islice(running, 3))
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    start = time.monotonic()
    while not said:
        got.append(next(running))
    assert time.monotonic() - start < 60  # 5 on an idle machine, which the campaign measures
    got += islice(running, 3)
    running.close()
    assert said == [said[0]] and "a worker that loads images was killed by SIGKILL" in said[0]
    same(got, islice(stream(Trapped()), len(got)))
    assert victim not in multiprocessing.active_children()


@pytest.mark.parametrize("kind", [pytest.param("sleep", marks=pytest.mark.slow), "hold"])
def test_a_record_that_hangs_is_bad_after_the_deadline(kind, tmp_path):
    said, file = [], tmp_path / "unusable_records.jsonl"
    clean = list(islice(stream(Trapped()), 20))
    record = int(clean[1]["index"][2])
    source = Trapped({record: kind})
    running = stream(source, workers=1, record_seconds=1.0, unusable=Unusable(file), say=said.append)
    got = list(islice(running, 20))
    running.close()
    assert replaced(got, clean, record, "timeout") >= 1
    assert len(said) == 1 and f"image-{record} (record {record}) took more than 1 s to read; counted as bad" in said[0]
    assert json.loads(file.read_text()) == {"record": record, "name": f"image-{record}", "cause": "timeout"}
    # Whoever starts again knows it, and reads it no more: this time without any worker.
    same(islice(stream(source, unusable=Unusable(file)), 20), got)


def test_a_record_that_crashes_its_reader_twice_is_bad():
    said = []
    clean = list(islice(stream(Trapped()), 8))
    record = int(clean[5]["index"][1])
    running = stream(Trapped({record: "segv"}), workers=1, say=said.append)
    got = list(islice(running, 8))
    running.close()
    assert replaced(got, clean, record, "crashed") == 1
    assert len(said) == 2 and f"was killed by SIGSEGV while it read image-{record} (record {record})" in said[0]
    assert "ended its worker twice; counted as bad" in said[1]


@pytest.mark.slow
def test_workers_that_always_die_end_the_run(tmp_path):
    """Each dies at another record, so none of these is to blame."""
    source = Trapped(always="kill")
    running = stream(source, workers=1, say=lambda _: None, unusable=Unusable())
    running._make = lambda step, bad, begin, make=running._make: make(step + 7 * len(running._suspects), bad, begin)
    with pytest.raises(WorkersDied, match="died 3 times in a row before step 1 .*data.workers to fewer") as caught:
        next(running)
    assert caught.value.exit_code == 71 and "\n" not in str(caught.value)


def test_errors_of_a_source_are_not_taken_for_deaths():
    class Wrong(Trapped):
        def __getitem__(self, index):
            raise KeyError("no such column")

    for workers in (0, 1):
        with pytest.raises(KeyError, match="no such column"):
            next(stream(Wrong(), workers=workers))


def test_without_workers_a_hang_ends_the_process_and_names_the_record(tmp_path):
    """Threads cannot be ended."""
    code = f"""
        import sys; sys.path[:0] = {sys.path!r}
        from test_data_workers import *
        unusable = Unusable(Path("unusable.jsonl"))
        for batch in islice(stream(Trapped({{5: "sleep"}}), record_seconds=0.5, unusable=unusable, say=print), 16):
            pass
        print(read_faults(np.concatenate([batch["faults"]])), unusable.causes)
    """
    command = [sys.executable, "-c", "from pathlib import Path\n" + textwrap.dedent(code)]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 124, first.stderr
    assert "image-5 (record 5) took more than 0.5 s to read; the run ends, and counts it as bad" in first.stdout
    assert second.returncode == 0 and "{5: 'timeout'}" in second.stdout, second.stderr


def test_a_torn_line_of_unusable_records_is_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    Unusable(file).add(7, "seven", "crashed")
    file.write_text(file.read_text() + '{"record": 8, "cau')
    assert Unusable(file).causes == {7: "crashed"}
