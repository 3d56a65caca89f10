"""A run that can start: all that can be checked of it without touching a device."""

import contextlib
import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from maejax import build, runs
from maejax.check import check
from maejax.data.cache import check_memory
from maejax.data.scan import scan
from maejax.data.sources import Source
from maejax.evaluate import Evaluator
from maejax.manifest import CorruptCheckpoint, read_meta, sealed_steps
from maejax.metrics import WeightsAndBiases
from maejax.start import check_same_shape
from maejax.workdir import check_images, check_same_run, check_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can start: its config is consistent, its images are there, its folder may be written to."""

    config: ConfigDict
    workdir: Path
    source: Source
    evaluator: Evaluator | None = None
    start_from: Path | None = None  # another run, whose weights this one begins with
    adapt: bool = False  # those weights may be for other images and classes
    notes: tuple[str, ...] = ()  # to be told at the start


def plan(
    config: ConfigDict,
    workdir: Path,
    *,
    start_from: Path | None = None,
    adapt: bool = False,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Checks a run without touching a device.

    Raises:
      UsageError: for the first thing that is wrong, saying what is allowed.
    """
    check(config)
    build.check_names(config)
    if config.wandb:
        WeightsAndBiases.check()
    check_workdir(workdir)
    source = build.source_of(config)
    if build.classifies(config):
        config = build.with_classes(config, source)
    # A folder in which nothing was saved yet, after a first attempt that failed, may start with another config.
    changes = check_same_run(workdir, config) if any((workdir / "checkpoints").glob("*")) else []
    if start_from is not None:
        before = runs.config_of_run(start_from)
        if not adapt:
            check_same_shape(start_from, before, config)
    scan(source, max_pixels=config.data.max_pixels, channels=config.data.channels, limit=64)  # is any of them an image?
    if config.data.cache is not None:
        notes = (*notes, check_memory(source, side=config.data.cache, channels=config.data.channels))
    for step in sealed_steps(workdir / "checkpoints")[::-1]:
        with contextlib.suppress(CorruptCheckpoint):  # told, and set aside, by the run
            check_images(workdir, read_meta(workdir / "checkpoints" / str(step))["data"], source.fingerprint())
            break
    names = build.eval_names(config)
    evaluator = Evaluator(config, names, limit=config.eval_images) if names else None
    notes = (*notes, *changes)
    return Plan(
        config=config, workdir=workdir, source=source, evaluator=evaluator, start_from=start_from, adapt=adapt,
        notes=notes,
    )  # fmt: skip
