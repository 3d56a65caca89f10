"""Say how many images a second the host prepares, a core and in total, by stage, and how many cores a model needs.

examples:
  maejax bench data ~/photos
  maejax bench data packed/train --config=pretrain_vit_l16_imagenet --chip=h100
  maejax bench data ~/photos --config.data.resize=fast --json

Stages are CPU time of one thread, on --images records evenly spaced in the source; the total is the pipeline of a run,
with its workers or threads, on the whole machine. With --chip: what a chip takes that computes at --mfu of its peak.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from maejax import config as configs
from maejax.chips import CHIPS
from maejax.commands.arguments import Parser, prepare_libraries, refuse_bare_assignment, split_config_flags
from maejax.errors import UsageError, look_up
from maejax.overrides import override

BATCH = 64  # images; how fast they come depends little on it
STAGES = ("read", "decode", "crop+resize", "mask", "batch")


def run(arguments: Sequence[str]) -> None:
    """maejax bench data."""
    file, assignments, others = split_config_flags(arguments)
    parser = Parser("bench data", __doc__)
    parser.add_argument("source", nargs="?", help="images: a folder, digits, tfds:NAME or arrayrecord:GLOB")
    parser.add_argument("--config", metavar="FILE", help="a recipe (default: pretrain_vit_b16_imagenet)")
    parser.add_argument("--chip", choices=CHIPS, help="say how many cores one of these needs")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that it reaches (default: 0.4)")
    parser.add_argument("--images", type=int, default=256, help="for the stages (default: 256)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for the total (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([options.source] if options.source else [])]:
        refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see maejax bench data --help")
    if not 0 < options.mfu <= 1:
        raise UsageError(f"--mfu={options.mfu} must lie between 0 and 1, for example 0.4")
    if options.images < 1 or not options.seconds > 0:
        raise UsageError(f"--images={options.images} and --seconds={options.seconds} must be positive")
    if options.source:
        assignments.setdefault("data.source", options.source)
    config = override(configs.load(file or "pretrain_vit_b16_imagenet"), assignments)
    result = measure(config, options.images, options.seconds)
    if options.chip:
        result |= needs(config, options.chip, options.mfu, result["img_per_sec_per_core"])
    if options.json:
        print(json.dumps(result | {"config": configs.to_dict(config)}))
        return
    for line in lines(result):
        print(line)


def measure(config: Any, images: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of an image by stage, and images a second, as --json prints them."""
    from maejax import build
    from maejax.check import check
    from maejax.data.pipeline import default_workers

    check(config)
    build.check_names(config)
    source = build.source_of(config)
    prepare_libraries()
    stages = stage_seconds(config, source, images)
    total, transfer, size = whole(config, source, seconds)
    alone = sum(stages.values())
    return {
        "source": config.data.source, "images": len(source), "repeats": config.data.repeats,
        "stages_ms": {name: round(1e3 * value, 4) for name, value in stages.items()},
        "img_per_sec_per_core": round(1 / alone, 1),
        "img_per_sec": round(total, 1),
        "cores": cores(),
        "workers": default_workers() if config.data.workers is None else config.data.workers,
        "transfer_ms": round(1e3 * transfer, 4), "bytes_per_image": round(size),
    }  # fmt: skip


def cores() -> int:
    """That this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stage_seconds(config: Any, source: Any, images: int) -> dict[str, float]:
    """CPU seconds of an image, by stage: the steps that the pipeline takes, one after the other in this thread."""
    from maejax import build
    from maejax.data.cache import InMemory
    from maejax.data.decode import BadImage
    from maejax.data.transforms import LoadImage, read_record

    c, d = config, config.data
    if d.cache is not None:
        source = InMemory(source, side=d.cache, channels=d.channels, max_pixels=d.max_pixels)
    augment, *mask = build.training_transforms(c)
    one = _One(source)
    part = augment if d.resize == "fast" else None
    load = LoadImage(source=one, channels=d.channels, max_pixels=d.max_pixels, part=part)
    spent, rng, examples = dict.fromkeys(STAGES, 0.0), np.random.default_rng(0), []

    def timed(stage: str, function: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        spent[stage] += time.thread_time() - start
        return result

    for index in np.linspace(0, len(source) - 1, images).astype(int):
        try:
            one.record = timed("read", read_record, source, int(index))
        except BadImage:
            continue
        loaded = timed("decode", load, int(index), rng)
        for _ in range(d.repeats):
            example = timed("crop+resize", augment, loaded, rng)
            for transform in mask:
                example = timed("mask", transform, example, rng)
            examples.append(example)
        if len(examples) >= BATCH:
            timed("batch", _fill, examples)
            examples = []
    if examples:
        timed("batch", _fill, examples)
    return {stage: seconds / (images * d.repeats) for stage, seconds in spent.items()}


class _One:
    """The source with every record the same: what has just been read."""

    def __init__(self, source: Any):
        self.num_classes, self._length, self.record = source.num_classes, len(source), None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.record


def _fill(examples: list[dict[str, Any]]) -> None:
    from maejax.data.batches import put

    batch: dict[str, np.ndarray] = {}
    for row, example in enumerate(examples):
        put(example, batch, row, len(examples))


def whole(config: Any, source: Any, seconds: float) -> tuple[float, float, float]:
    """Images a second of the pipeline as a run has it; seconds and bytes of an image on its way to the devices."""
    import jax

    from maejax import build
    from maejax.mesh import make_mesh, to_global

    mesh = make_mesh(config.mesh)
    rows = config.data.repeats * mesh.size
    config = override(config, {"batch_size": str(-(-BATCH // rows) * rows)})
    with contextlib.closing(build.training_batches(config, source, mesh, first_step=0)) as batches:
        for _ in range(2):
            batch = dict(next(batches))
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            batch = dict(next(batches))
            images += len(batch["image"])
        rate = images / (time.perf_counter() - start)
    sent = {key: value for key, value in batch.items() if key not in ("index", "faults")}
    jax.block_until_ready(to_global(sent, mesh))
    start = time.perf_counter()
    for _ in range(8):
        jax.block_until_ready(to_global(sent, mesh))
    transfer = (time.perf_counter() - start) / 8
    count = len(sent["image"])
    return rate, transfer / count, sum(value.nbytes for value in sent.values()) / count


def needs(config: Any, chip: str, mfu: float, per_core: float) -> dict[str, Any]:
    """How many images a second a chip takes, and how many cores that needs."""
    from maejax import build

    demand = look_up(CHIPS, chip, "--chip").peak * mfu / build.mean_flops_per_image(config)
    return {
        "chip": chip, "mfu": mfu, "chip_img_per_sec": round(demand, 1), "cores_needed": round(demand / per_core, 1),
        "model": f"{config.model.size}/{configs.pair(config.model.patch)[0]}",
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """For people."""
    stages, alone = result["stages_ms"], sum(result["stages_ms"].values())
    text = [f"source    {result['source']}, {result['images']:,} images"]
    text += [f"{name:12} {value:7.3f} ms an image {value / alone:5.0%}" for name, value in stages.items()]
    text.append(f"one core  {alone:7.3f} ms an image, {result['img_per_sec_per_core']:,.0f} img/s")
    by = f"{result['workers']} workers" if result["workers"] else "threads"
    text.append(f"total     {result['img_per_sec']:,.0f} img/s on {result['cores']} cores ({by})")
    text.append(f"transfer  {result['transfer_ms']:.3f} ms an image of {result['bytes_per_image']:,} bytes")
    if "chip" in result:
        text.append(
            f"needs     ViT-{result['model']} on one {result['chip']} at {result['mfu']:.0%} of its peak takes "
            f"{result['chip_img_per_sec']:,.0f} img/s: {result['cores_needed']:g} cores like these"
        )
    return text
