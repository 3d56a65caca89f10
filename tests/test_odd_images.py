"""More than sixty odd files, each with one outcome, the same from bytes, from a folder and from ArrayRecord files."""

import numpy as np
import pytest
from odd_images import corpus

from maejax.data.decode import CAUSES, BadImage, decode
from maejax.data.sources import make_source
from maejax.data.transforms import LoadImage, read_faults

CORPUS = corpus()
MAX = 10_000_000


def test_there_are_enough_of_every_kind():
    bad = [outcome for _, outcome in CORPUS.values() if isinstance(outcome, str)]
    assert len(CORPUS) - len(bad) >= 60 and len(bad) >= 50
    assert set(bad) == set(CAUSES) - {"unreadable", "timeout", "crashed"}  # these are not of the bytes


@pytest.mark.parametrize("name", CORPUS)
def test_bytes(name):
    data, outcome = CORPUS[name]
    if isinstance(outcome, str):
        with pytest.raises(BadImage) as caught:
            decode(data, channels=3, max_pixels=MAX)
        assert caught.value.cause == outcome, caught.value
    else:
        np.testing.assert_array_equal(decode(data, channels=3, max_pixels=MAX), outcome)


@pytest.mark.parametrize("kind", ["folder", "arrayrecord"])
def test_a_source_of_all_of_them(kind, tmp_path):
    names = sorted(CORPUS)
    if kind == "folder":
        for name in names:
            (tmp_path / name).write_bytes(CORPUS[name][0])
        source = make_source(str(tmp_path), split="")
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        # A record has no length of zero, and one that begins as an Example is taken for one.
        names = [name for name in names if CORPUS[name][0] and not CORPUS[name][0].startswith(b"\n")]
        writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
        for name in names:
            writer.write(CORPUS[name][0])
        writer.close()
        source = make_source(f"arrayrecord:{tmp_path}/*", split="")
    assert len(source) == len(names)
    load = LoadImage(source=source, channels=3, max_pixels=MAX)
    for i, name in enumerate(names):
        outcome = CORPUS[name][1]
        got = load(i, np.random.default_rng(i))
        if isinstance(outcome, str):
            assert read_faults(got["faults"])[0] == (i, outcome), name
            # Another one takes its place: the first good one of those that the place's own generator draws.
            draws = np.random.default_rng(i)
            drawn = [int(draws.integers(len(names))) for _ in range(4)]
            good = [index for index in drawn[:3] if not isinstance(CORPUS[names[index]][1], str)]
            assert got["index"] == (good[0] if good else drawn[3])
        else:
            assert got["index"] == i and not read_faults(got["faults"])
            np.testing.assert_array_equal(got["image"], outcome)


def test_what_is_no_file_is_left_out_or_unreadable(tmp_path):
    import os

    (tmp_path / "good.png").write_bytes(CORPUS["plain.png"][0])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "self").symlink_to(tmp_path)
    source = make_source(str(tmp_path), split="")
    assert [source.name(i) for i in range(len(source))] == ["good.png", "nowhere.jpg"]
    load = LoadImage(source=source, channels=3, max_pixels=MAX)
    assert read_faults(load(1, np.random.default_rng(1))["faults"])[0] == (1, "unreadable")
    (tmp_path / "good.png").unlink()
    os.mkfifo(tmp_path / "good.png")  # since it was listed
    assert read_faults(load(0, np.random.default_rng(1))["faults"])[0] == (0, "unreadable")


def test_bombs_cost_neither_memory_nor_time(tmp_path):
    import bombs

    assert len(bombs.measure(tmp_path, sorted(bombs.BOMBS))) == 10
