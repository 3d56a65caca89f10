"""Images kept in memory, and several examples of each decoded image."""

import pickle
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from maejax import build
from maejax import config as configs
from maejax.data import cache
from maejax.data.cache import InMemory, check_memory, free_memory
from maejax.data.decode import BadImage
from maejax.data.masking import Mask
from maejax.data.pipeline import train_batches
from maejax.data.sources import Digits, Folder
from maejax.data.transforms import Augment
from maejax.errors import UsageError
from maejax.mesh import make_mesh
from maejax.overrides import override
from maejax.prepare import plan

TRANSFORMS = (Augment(size=(16, 12)), Mask(sampler="random", grid=(4, 3), visible=3))


def batches(count, source=None, **changes):
    options = dict(channels=3, max_pixels=10**8, batch_size=8, seed=0) | changes
    return list(islice(iter(train_batches(source or Digits(split="test"), TRANSFORMS, **options)), count))


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture
def folder(tmp_path):
    """Two classes of images: larger and smaller than 20 pixels, a wide one, and one that is none."""
    rng = np.random.default_rng(0)
    for number, (h, w) in enumerate([(30, 60), (60, 30), (10, 12), (20, 20), (4, 200), (33, 47)]):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(
            tmp_path / "ab"[number % 2] / f"{number}.png"
        )
    (tmp_path / "b" / "9.png").write_bytes(b"no image")
    return tmp_path


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_pillows_resize_of_the_image(folder):
    kept = InMemory(Folder(folder), side=20, channels=3, max_pixels=10**6)
    assert len(kept) == 7 and kept.num_classes == 2
    sizes = {"a/0.png": (20, 40), "b/1.png": (40, 20), "a/2.png": (10, 12), "b/3.png": (20, 20), "a/4.png": (4, 200),
             "b/5.png": (20, 28)}  # fmt: skip
    for index in range(6):
        record, name = kept[index], kept.name(index)
        expected = Image.open(folder / name)
        expected = np.asarray(expected.resize(sizes[name][::-1], Image.Resampling.BICUBIC)).astype(int)
        assert record["label"] == "ab".index(name[0])
        assert record["image"].shape == expected.shape
        assert np.abs(record["image"] - expected).mean() <= (0 if min(expected.shape[:2]) < 20 else 1)
    with pytest.raises(BadImage, match="not_an_image"):
        kept[6]
    assert kept.fingerprint() == Folder(folder).fingerprint()


def test_batches_from_memory_are_those_of_images_that_small():
    # Digits are 8 x 8: a cache of 8 or more changes nothing, workers map the same file.
    plain = batches(5)
    same(plain, batches(5, cache=8))
    same(plain, batches(5, cache=64, workers=2))


def test_the_pixels_are_not_sent_to_workers(folder):
    kept = InMemory(Folder(folder), side=20, channels=3, max_pixels=10**6)
    sent = pickle.dumps(kept)
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again[0]["image"], kept[0]["image"])
    large = InMemory(Digits(split="all"), side=8, channels=3, max_pixels=10**6)
    assert len(pickle.dumps(large)) < len(pickle.dumps(Digits(split="all"))) + 1797 * 40
    with pytest.raises(ValueError, match="read-only"):
        again[0]["image"][0, 0] = 0


def test_more_than_the_memory_holds_is_refused_before_the_run(monkeypatch, folder):
    line = check_memory(Folder(folder), side=20, channels=3)
    assert line == "cache     7 images, shorter side at most 20: about 0 MB of memory"
    monkeypatch.setattr(cache, "free_memory", lambda: 8000)  # the six take 8,440 bytes, and one more was found bad
    with pytest.raises(UsageError, match=r"data.cache=20 needs .* GB or more for 7 images, and .* 80% of what is free"):
        check_memory(Folder(folder), side=20, channels=3)
    with pytest.raises(UsageError, match="data.cache=20 needs"):
        InMemory(Folder(folder), side=20, channels=3, max_pixels=10**6)


def test_memory_is_free():
    assert 10**7 < free_memory() < 10**14


def test_a_run_tells_what_the_cache_takes(tmp_path, monkeypatch):
    c = override(configs.load("pretrain_digits"), {"data.cache": "8", "evals": ""})
    assert plan(c, tmp_path / "run").notes == ("cache     1,438 images, shorter side at most 8: about 0 MB of memory",)
    monkeypatch.setattr(cache, "free_memory", lambda: 10_000)
    with pytest.raises(UsageError, match="data.cache=8 needs 0.00 GB"):
        plan(c, tmp_path / "run")


# ---- Repeats --------------------------------------------------------------------------------------------------------


def test_repeats_are_neighbors_in_the_order_of_the_stream():
    plain = np.concatenate([batch["index"] for batch in batches(4)])
    repeated = batches(16, repeats=4)
    index = np.concatenate([batch["index"] for batch in repeated])
    np.testing.assert_array_equal(index.reshape(-1, 4), np.repeat(plain[:, None], 4, axis=1))
    for batch in repeated[:4]:
        for key in ("image", "visible", "masked"):
            groups = batch[key].reshape(2, 4, *batch[key].shape[1:])
            different = len({group.tobytes() for group in groups[0]})  # each a crop and a mask of its own
            assert different == 4 if key == "image" else different >= 3, key  # of 220 masks, two may be the same
        np.testing.assert_array_equal(batch["label"][:4], batch["label"][0])
    shapes = {key: (value.shape, value.dtype) for key, value in repeated[0].items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in batches(1)[0].items()}


def test_repeats_are_a_function_of_seed_and_place():
    whole = batches(6, repeats=2)
    same(whole, batches(6, repeats=2, workers=2))
    same(whole[4:], batches(2, repeats=2, start_step=4))
    shares = [batches(6, repeats=2, process_index=p, process_count=2) for p in range(2)]
    same(whole, [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)])
    other = batches(1, repeats=2, seed=1)[0]
    assert not np.array_equal(other["index"], whole[0]["index"])


def test_faults_of_a_repeated_image_are_told_once(folder):
    found = batches(7, source=Folder(folder), repeats=4, batch_size=4)  # an epoch of 7
    codes = np.concatenate([batch["faults"] for batch in found])
    first = codes[:, 0]  # further tries may hit the bad one again
    assert (first == 6 * 16 + 2).sum() == 1 and (first >= 0).sum() == 1


def test_processes_with_one_image_each_hold_rows_of_the_same_batches():
    whole = batches(3, batch_size=2)
    shares = [batches(3, batch_size=2, process_index=p, process_count=2) for p in range(2)]
    same(whole, [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)])


def test_rows_that_cannot_be_grouped_are_refused():
    with pytest.raises(UsageError, match="data.repeats=3 must divide the 8 images"):
        batches(1, repeats=3)


def test_the_config_reaches_the_pipeline():
    c = override(configs.load("pretrain_digits"), {"batch_size": "16", "data.repeats": "4", "data.workers": "0"})
    stream = build.training_batches(c, build.source_of(c), make_mesh(c.mesh), first_step=0)
    assert (next(stream)["index"].reshape(4, 4).std(axis=1) == 0).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data.repeats": "3"}, "batch_size=128 is not divisible by data.repeats=3"),
        ({"data.repeats": "0"}, "data.repeats=0 must be at least 1"),
        ({"data.cache": "0"}, "data.cache=0 must be a number of pixels"),
        ({"data.resize": "quick"}, "data.resize='quick' is not one of exact, fast"),
        ({"data.resize": "fast", "data.crop": "center"}, "data.resize=fast needs data.crop=random_resized, not center"),
        ({"data.resize": "fast", "data.repeats": "4"}, "data.resize=fast needs data.repeats=1, not 4"),
        ({"data.resize": "fast", "data.cache": "9"}, "data.resize=fast needs data.cache=None, not 9"),
    ],
)
def test_what_cannot_be_is_one_line(settings, message):
    from maejax.check import check

    with pytest.raises(UsageError, match=message):
        check(override(configs.load("pretrain_digits"), settings))
