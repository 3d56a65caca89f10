"""The order contract: batches are a function of seed and step, whatever reads them."""

import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest

from maejax.data.batches import stream_seed
from maejax.data.masking import Mask
from maejax.data.pipeline import eval_batches, train_batches
from maejax.data.sources import Digits, Folder
from maejax.data.transforms import Augment

AUGMENT = Augment(size=(16, 12))
MASK = Mask(sampler="random", grid=(4, 3), visible=3)
OPTIONS = dict(channels=3, max_pixels=10**8, batch_size=8, seed=0)


def batches(count, source=None, transforms=(AUGMENT, MASK), **changes):
    stream = train_batches(source or Digits(split="test"), transforms, **(OPTIONS | changes))
    return list(islice(iter(stream), count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_has_the_shapes_of_the_contract():
    (batch,) = batches(1)
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "image": ((8, 16, 12, 3), np.uint8),
        "visible": ((8, 3), np.int32),
        "masked": ((8, 9), np.int32),
        "label": ((8,), np.int32),
        "index": ((8,), np.int64),
        "faults": ((8, 4), np.int64),
    }


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(workers):
    same(batches(6), batches(6, workers=workers))


def test_fine_tuning_has_boxes_to_erase_and_no_masks():
    strong = [Augment(size=(16, 12), scale=(0.08, 1.0), rand_augment=9.0, erasing=0.25)]
    got = batches(12, transforms=strong)
    assert got[0].keys() == {"image", "erase", "label", "index", "faults"}
    boxes = np.concatenate([batch["erase"] for batch in got])
    assert boxes.shape == (96, 4) and boxes.dtype == np.int32
    assert 0.1 < (boxes[:, 2] > 0).mean() < 0.45
    same(got[5:8], batches(3, transforms=strong, start_step=5, workers=2))


def test_two_processes_hold_contiguous_rows_of_the_same_batches():
    whole = batches(6)
    shares = [batches(6, process_index=p, process_count=2) for p in range(2)]
    together = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)]
    same(whole, together)


@pytest.mark.parametrize("start", [1, 5, 50])  # 45 batches are an epoch
def test_a_stream_can_be_entered_at_any_step(start):
    same(batches(start + 3)[start:], batches(3, start_step=start))
    same(batches(3, start_step=start), batches(3, start_step=start, workers=2))


def test_an_epoch_reads_every_record_once_and_epochs_differ():
    source = Digits(split="test")  # 359 records
    index = np.concatenate([batch["index"] for batch in batches(90, source)])
    first, second = index[:359], index[359 : 2 * 359]
    assert sorted(first) == sorted(second) == list(range(359))
    assert (first != second).any()


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = batches(1, batch_size=1000)
    assert sorted(batch["index"][:359]) == list(range(359))


def test_masks_and_crops_differ_between_epochs_and_images():
    got = np.concatenate([batch["visible"] for batch in batches(45)])
    assert len({tuple(row) for row in got}) > 100


def test_seeds_do_not_share_epochs():
    assert len({stream_seed(seed) for seed in range(1000)}) == 1000
    one, two = (np.concatenate([b["index"] for b in batches(90, seed=seed)]) for seed in (0, 1))
    assert (one[359:718] != two[:359]).any()


def test_bad_files_disturb_no_other_row(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        np.save(tmp_path / f"{i:02}.npy", rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    clean = batches(10, Folder(tmp_path))
    (tmp_path / "07.npy").write_bytes(b"\x93NUMPY\x01\x00broken")
    dirty = batches(10, Folder(tmp_path))
    hit = 0
    for a, b in zip(clean, dirty, strict=True):
        bad = a["index"] == 7
        hit += bad.sum()
        for key in ("image", "index", "visible"):
            np.testing.assert_array_equal(a[key][~bad], b[key][~bad])
        assert ((b["faults"][:, 0] == 7 * 16 + 6) == bad).all()
    assert hit == 4  # 80 rows over 20 files
    same(dirty, batches(10, Folder(tmp_path), workers=2))


def test_evaluation_reads_every_image_once_and_pads(tmp_path):
    source = Digits(split="test")
    got = list(eval_batches(source, image_size=(8, 8), channels=1, max_pixels=100, batch_size=100))
    assert [batch["valid"].sum() for batch in got] == [100, 100, 100, 59]
    assert all(len(batch["image"]) == 100 for batch in got)
    valid = np.concatenate([batch["image"][batch["valid"]] for batch in got])
    np.testing.assert_array_equal(valid, np.stack([source[i]["image"] for i in range(359)]))
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in got])
    np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(359)])


class Counting:
    """Remembers how many records were asked for."""

    num_classes = None

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        self.asked.append(index)
        return {"image": np.zeros((4, 4, 3), np.uint8)}


def test_evaluation_reads_no_more_than_a_few_batches_ahead():
    source = Counting()
    stream = eval_batches(source, image_size=(4, 4), channels=3, max_pixels=100, batch_size=10)
    next(stream)
    before = -1
    while before != len(source.asked):  # until the threads have nothing left to do
        before = len(source.asked)
        time.sleep(0.3)
    assert 10 <= before <= 60


def test_tensorflow_is_never_imported(shared_data):
    code = (
        "import sys, maejax.data.pipeline, maejax.data.scan\n"
        "from maejax.data.sources import make_source\n"
        "source = make_source('tfds:cifar10', split='test', data_dir=sys.argv[1])\n"
        "assert len(source) == 10000 and source[0]['image'][:2] == b'\\xff\\xd8'\n"
        "assert not {'tensorflow', 'torch', 'clu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(shared_data / "tfds")], check=True)
