"""Records to batches. The order is a pure function: nothing but the seed and the step decides what a batch holds.

Row r of step s is place s * batch_size + r of one endless stream. The record at a place, its crop, its flip and its
mask depend on the seed and the place alone, so a run may change its devices, processes and workers and see the same
batches. Each process takes contiguous rows. The state of the data is the number of the step; no iterator is ever saved.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from maejax.data.batches import MakeBatch, Transform
from maejax.data.cache import InMemory
from maejax.data.decode import BadImage, decode
from maejax.data.desk import Unusable
from maejax.data.sources import Source
from maejax.data.transforms import Augment, LoadImage, center, read_record
from maejax.data.workers import Begin, Say, Stream

Batch = dict[str, np.ndarray]
EVAL_PREFETCH = 2  # batches; Grain's own default is 500, which is all of many data sets
PADDING = -1  # stands for no record
ENDLESS = 2**48  # batches, in numbers that Grain can still count


def default_workers() -> int:
    """Worker processes for this machine: none where the accelerator's host thread needs the few cores itself."""
    cores = os.cpu_count() or 1
    return 0 if cores < 8 else min(cores - 2, 16)


def train_batches(
    source: Source,
    transforms: Sequence[Transform],
    *,
    channels: int,
    max_pixels: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    cache: int | None = None,
    repeats: int = 1,
    fast: bool = False,
    record_seconds: float = 60.0,
    unusable: Unusable | None = None,
    say: Say | None = None,
) -> Stream:
    """This process's rows of every batch from `start_step` on, without end.

    `transforms` are applied in order to each loaded example: an `Augment`, and a `Mask` to pretrain; `repeats` times to
    each, see `batches`. `cache`: images are kept in memory, their shorter side at most this; see `cache`. `fast`: of
    each image no more is decoded than its crop needs; see `partial`.

    A batch: `image` uint8 (b h w c), `label` int32 (b) if the source has labels, `index` int64 (b), `faults` int64
    (b 4; see `transforms.read_faults`), and what the transforms add: `visible` int32 (b v), `masked` int32 (b m),
    `erase` int32 (b 4). b is batch_size / process_count.

    A record that takes longer than `record_seconds`, or that is in `unusable`, is bad; see `workers`.
    """
    if cache is not None:
        source = InMemory(source, side=cache, channels=channels, max_pixels=max_pixels)
    rows = batch_size // process_count
    part = next((t for t in transforms if isinstance(t, Augment)), None) if fast else None

    def make(step: int, bad: Mapping[int, str], begin: Begin | None) -> Any:
        load = LoadImage(source=source, channels=channels, max_pixels=max_pixels, unusable=bad, part=part)
        make_batch = MakeBatch(
            load=load, transforms=transforms, num_examples=len(source), seed=seed, batch_size=batch_size,
            first_row=process_index * rows, rows=rows, repeats=repeats,
        )  # fmt: skip
        batches = grain.MapDataset.range(step, ENDLESS).map(make_batch)
        if begin is None:
            return batches.to_iter_dataset(_read_ahead(prefetch))
        _let_grain_read_flags()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(prefetch // workers, 1))
        one_at_a_time = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return batches.to_iter_dataset(one_at_a_time).mp_prefetch(options, worker_init_fn=begin)

    return Stream(
        make, name_of=source.name, first_step=start_step, workers=workers, seconds=record_seconds, unusable=unusable,
        say=say,
    )  # fmt: skip


def _read_ahead(batches: int) -> Any:
    """Threads, and how many batches they keep ready."""
    return grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=batches)


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    channels: int,
    max_pixels: int,
    batch_size: int,
    share: float = 1.0,
    indices: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every record once (or those of `indices`), in order, resized to cover `image_size` / `share`, its center cropped.

    `image`, `index`, `label` if there are labels, and `valid` bool (b): False for images that cannot be read and for
    the padding that gives the last batch its full size. Of each batch this process gets its part, b =
    batch_size / process_count contiguous rows.
    """
    numbers = np.arange(len(source)) if indices is None else indices
    padded = np.pad(numbers, (0, -len(numbers) % batch_size), constant_values=PADDING)
    mine = padded.reshape(-1, process_count, batch_size // process_count)[:, process_index].reshape(-1)
    load = _EvalImage(source, image_size, share, channels, max_pixels)
    examples = grain.MapDataset.source(mine).map(load)
    return iter(examples.batch(batch_size // process_count).to_iter_dataset(_read_ahead(EVAL_PREFETCH)))


class _EvalImage(grain.transforms.Map):
    def __init__(self, source: Source, size: tuple[int, int], share: float, channels: int, max_pixels: int):
        self._source, self._size, self._share = source, size, share
        self._channels, self._max_pixels = channels, max_pixels

    def map(self, element: Any) -> dict[str, Any]:
        index = int(element)
        label = 0
        try:
            if index == PADDING:
                raise BadImage("empty")
            record = read_record(self._source, index)
            label = record.get("label", 0)
            image = decode(record["image"], channels=self._channels, max_pixels=self._max_pixels)
            image, valid = center(image, None, size=self._size, share=self._share), True
        except BadImage:
            image, valid = np.zeros((*self._size, self._channels), np.uint8), False
        example = {"image": np.ascontiguousarray(image), "index": np.int64(index), "valid": np.bool_(valid)}
        return example | ({} if self._source.num_classes is None else {"label": np.int32(label)})


def _let_grain_read_flags() -> None:
    """Grain's worker processes read absl's flags, which nobody has parsed outside of absl's `app.run`."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
