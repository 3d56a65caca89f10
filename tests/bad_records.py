"""Folders of small images of which some are broken, and what must be true of the batches that are made of them."""

import random
from itertools import islice
from pathlib import Path

import numpy as np

from maejax.data.pipeline import train_batches
from maejax.data.sources import Folder
from maejax.data.transforms import Augment, read_faults

WAYS = {  # to break a .npy file, and the cause of each
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-5],
    "not_an_image": lambda data: b"hello" * 9,
    "corrupt": lambda data: data[:10] + b"garbage",
}


def make_images(folder: Path, count: int, rng: random.Random) -> None:
    generator = np.random.default_rng(rng.getrandbits(32))
    folder.mkdir(parents=True)
    for i in range(count):
        np.save(folder / f"{i:04}.npy", generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))


def break_some(folder: Path, count: int, rng: random.Random) -> dict[int, str]:
    """{record: cause} of `count` files that were broken at random."""
    files = sorted(folder.iterdir())
    causes = {record: rng.choice(sorted(WAYS)) for record in rng.sample(range(len(files)), count)}
    for record, cause in causes.items():
        files[record].write_bytes(WAYS[cause](files[record].read_bytes()))
    return causes


def rows(folder: Path, steps: int, batch_size: int, *, process_count: int = 1, start: int = 0, **options) -> dict:
    """All arrays of `steps` batches, row by row in the order of the stream, whoever reads them."""
    source, parts = Folder(folder), []
    for process in range(process_count):
        stream = train_batches(
            source, [Augment(size=(4, 4))], channels=3, max_pixels=1000, batch_size=batch_size, seed=5,
            process_index=process, process_count=process_count, start_step=start, **options,
        )  # fmt: skip
        parts.append(list(islice(stream, steps)))
        stream.close()
    batches = [part[step] for step in range(steps) for part in parts]
    return {key: np.concatenate([batch[key] for batch in batches]) for key in ("image", "index", "faults")}


def hold(folder: Path, rng: random.Random, *, images: int, bad: int, epochs: int, workers: int) -> dict[str, float]:
    """Breaks some images and compares with the clean run: order, pixels, counts; and over processes and restarts."""
    make_images(folder, images, rng)
    steps = epochs * images // 16
    clean = rows(folder, steps, 16)
    causes = break_some(folder, bad, rng)
    dirty = rows(folder, steps, 16)
    hit = np.isin(clean["index"], list(causes))
    assert hit.any()
    for key in ("image", "index"):
        np.testing.assert_array_equal(clean[key][~hit], dirty[key][~hit])
    assert not np.isin(dirty["index"], list(causes)).any()
    for row, faults in enumerate(dirty["faults"]):
        found = read_faults(faults)
        assert (len(found) > 0) == hit[row] and all(causes[record] == cause for record, cause in found)
        assert not found or found[0][0] == clean["index"][row]
    # The replacement is a function of the seed and the place: the same whoever reads, from wherever, in what batches.
    middle = steps // 3
    for other, first in (
        (rows(folder, steps, 16, process_count=2), 0), (rows(folder, steps, 16, process_count=4), 0),
        (rows(folder, steps // 2, 32), 0), (rows(folder, steps - middle, 16, start=middle), middle * 16),
        *([(rows(folder, steps - middle, 16, start=middle, workers=workers), middle * 16)] if workers else []),
    ):  # fmt: skip
        length = len(other["index"])
        for key in ("image", "index", "faults"):
            np.testing.assert_array_equal(other[key], dirty[key][first : first + length])
    return {"rows": len(hit), "bad": int(hit.sum())}
