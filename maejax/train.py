"""One run, from its config to the last checkpoint, to be read from top to bottom. This is the only loop.

`plan` checks everything that can be checked without touching a device; `train` does the rest.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from maejax import build, hooks, runs
from maejax import config as configs
from maejax.check import check
from maejax.checkpoint import Checkpoints, sealed_steps
from maejax.data.scan import scan
from maejax.data.sources import Source
from maejax.data.transforms import read_faults
from maejax.describe import describe
from maejax.errors import StorageFailed
from maejax.evaluate import Evaluator, Results, by_metric
from maejax.interruption import Interruption, News, StepEnd, StopWhenAsked
from maejax.mesh import make_mesh, to_global
from maejax.metrics import Console, WeightsAndBiases, Writer, cut_json_lines, open_writers, shown
from maejax.processes import check_same, is_primary, on_primary, share
from maejax.program import make_program
from maejax.start import check_same_shape, starting_state
from maejax.state import TrainState
from maejax.tree import count
from maejax.workdir import check_same_run, check_workdir, lock, record_start


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
    scan(source, max_pixels=config.data.max_pixels, limit=64)  # is any of them an image?
    names = build.eval_names(config)
    evaluator = Evaluator(config, names, limit=config.eval_images) if names else None
    notes = (*notes, *changes)
    return Plan(
        config=config, workdir=workdir, source=source, evaluator=evaluator, start_from=start_from, adapt=adapt,
        notes=notes,
    )  # fmt: skip


def train(p: Plan) -> Path:
    """Runs to the end, from the newest checkpoint if there is one; returns the workdir.

    Raises:
      MaejaxError: Preempted, TooManyBadImages, NoValidCheckpoint, Diverged or StorageFailed, each with its exit code.
    """
    c = p.config
    same = {key: value for key, value in configs.flatten(c) if key not in ("data.dir", "data.workers", "data.prefetch")}
    check_same(same | {"the data": p.source.fingerprint(), "--workdir": str(p.workdir)})
    mesh = make_mesh(c.mesh)
    program = make_program(c, mesh, num_examples=len(p.source), num_classes=p.source.num_classes)
    objective, total_steps = program.objective, program.total_steps

    with contextlib.ExitStack() as cleanup:
        held = on_primary(lambda: lock(p.workdir))
        if held:
            cleanup.enter_context(held)
        log = p.workdir / "train.log" if is_primary() else None
        console = cleanup.enter_context(Console(log, quiet=not is_primary()))
        checkpoints = Checkpoints(p.workdir / "checkpoints", keep=c.keep_checkpoints, say=console.say)
        cleanup.callback(checkpoints.close)
        interruption = cleanup.enter_context(Interruption().watch())
        for line in (*p.notes, f"run       {p.workdir}", *describe(c, p.source, mesh, count(program.shapes.params))):
            console.say(line)
        on_primary(lambda: record_start(p.workdir, c, f"{jax.device_count()} x {jax.devices()[0].device_kind}"))

        state, meta = starting_state(
            checkpoints, p.source, program.new_state, program.shapes, objective,
            config=c, start_from=p.start_from, adapt_weights=p.adapt, say=console.say,
        )  # fmt: skip
        first = int(state.step)
        writers = resume_records(p, first) if is_primary() else []
        for writer in writers:
            cleanup.callback(writer.close)
        painter = make_painter(p, objective, writers)
        evaluate = make_evaluate(p, objective, mesh, writers, console)
        at_end = make_hooks(
            p, checkpoints, writers, console, interruption, painter, evaluate, first=first, total=total_steps, meta=meta
        )
        profile = hooks.Profile(p.workdir / "profile", c.profile_steps, first_step=first)
        cleanup.callback(profile.close)
        with contextlib.closing(feed(p, mesh, first, total_steps)) as batches:
            state = loop(program.train_step, state, batches, [profile, *at_end], first)
        checkpoints.wait()
        if total_steps not in share(sealed_steps(checkpoints.folder)):
            raise StorageFailed(f"the last checkpoint could not be written to {checkpoints.folder}; see the log above")
        finish(p, console, state, program.new_state, evaluate)
    return p.workdir


# ---- The loop -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch on its way to the devices, and what the host knows of it."""

    batch: dict[str, jax.Array]
    faults: list[tuple[int, str]]
    wait: float  # seconds until the host had it


def feed(p: Plan, mesh: jax.sharding.Mesh, first: int, total: int) -> Generator[Fed]:
    """The batches of steps `first` to `total`. Transfers overlap with the step that is under way."""
    if first >= total:
        return
    with contextlib.closing(build.training_batches(p.config, p.source, mesh, first_step=first)) as batches:
        for _ in range(first, total):
            start = time.perf_counter()
            rows = dict(next(batches))
            wait = time.perf_counter() - start
            faults = read_faults(rows.pop("faults"))
            rows.pop("index")  # stays on the host: devices have no int64
            yield Fed(to_global(rows, mesh), faults, wait)


def loop(
    train_step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Fed],
    at_end: list[Callable[[StepEnd], None]],
    first: int,
) -> TrainState:
    """Every step, and after each its hooks."""
    before: Any = ()
    for step, fed in enumerate(batches, start=first + 1):
        state, metrics = train_step(state, fed.batch)
        # The host may be one step ahead of the devices and no more: their queue is never empty, and never long.
        jax.block_until_ready(before)
        before = metrics
        end = StepEnd(step=step, state=state, metrics=metrics, data_wait=fed.wait, faults=fed.faults)
        for hook in at_end:
            hook(end)
    return state


# ---- What surrounds it ----------------------------------------------------------------------------------------------


def resume_records(p: Plan, first: int) -> list[Writer]:
    """Cuts what was recorded of steps after `first`, which are computed again; opens the sinks of metrics."""
    for file in (p.workdir / "metrics.jsonl", *p.workdir.glob("bad_images*.jsonl")):
        cut_json_lines(file, first)
    if p.evaluator:
        p.evaluator.forget(p.workdir, first)
    c = p.config
    return open_writers(p.workdir, first, configs.to_dict(c), tensorboard=c.tensorboard, wandb=c.wandb)


def make_painter(p: Plan, objective: nn.Module, writers: list[Writer]) -> Callable[[TrainState, int], None]:
    """The function that draws reconstructions of some images."""
    if getattr(objective, "predict", None) is None:  # another objective may have nothing to show
        return lambda state, step: None
    painter = runs.Painter(p.config, objective, runs.preview_images(p.config))

    def draw(state: TrainState, step: int) -> None:
        path = p.workdir / "pictures" / f"reconstruction_{step}.png"
        image = painter.draw(state.ema or state.params, path if is_primary() else None, f"step {step}")
        for writer in writers:
            writer.image(step, "reconstruction", image)

    return draw


def make_hooks(
    p: Plan,
    checkpoints: Checkpoints,
    writers: list[Writer],
    console: Console,
    interruption: Interruption,
    draw: Callable[[TrainState, int], None],
    evaluate: Callable[[TrainState, int], Any],
    *,
    first: int,
    total: int,
    meta: dict[str, Any],
) -> list[Callable[[StepEnd], None]]:
    """What happens after every step, in this order: a step is saved when all that belongs to it has been done."""
    c, n = p.config, len(p.source)
    news = News(interruption, bad_images=meta["bad_images"])
    others = "" if is_primary() else f".{jax.process_index()}"  # files of the other processes have their numbers
    bad_images = hooks.ListBadImages(
        p.workdir / f"bad_images{others}.jsonl", p.source.name, news,
        batch_size=c.batch_size, max_fraction=c.data.max_bad_fraction,
    )  # fmt: skip
    log = hooks.LogMetrics(
        writers,
        console,
        every=configs.steps(c, "log", n),
        total_steps=total,
        first_step=first,
        batch_size=c.batch_size,
        num_examples=n,
        flops_per_image=build.flops_per_image(c),
        news=news,
    )
    save = hooks.SaveCheckpoint(checkpoints, log, news, every=configs.steps(c, "save", n), total_steps=total, meta=meta)
    picture = hooks.Periodically(draw, log, every=configs.steps(c, "picture", n), total_steps=total)
    worth = hooks.Periodically(evaluate, log, every=configs.steps(c, "eval", n), total_steps=total)

    def save_and_wait(end: StepEnd) -> None:
        save.save(end)
        checkpoints.wait()

    stop = StopWhenAsked(interruption, news, save_and_wait)
    return [news, bad_images, log, worth, picture, save, stop]


def make_evaluate(
    p: Plan, objective: nn.Module, mesh: jax.sharding.Mesh, writers: list[Writer], console: Console
) -> Callable[[TrainState, int], Results]:
    """The function that runs the evaluations that the config asks for, once for every step; step 0 is untrained."""

    def evaluate(state: TrainState, step: int) -> Results:
        if p.evaluator is None:
            return {}
        if (known := share(p.evaluator.recorded(p.workdir, step))) is not None:
            return known
        results = p.evaluator(objective, {"params": state.ema or state.params, **state.stats}, mesh)
        if is_primary():
            p.evaluator.record(p.workdir, step, results)
        if step > 0:
            values = by_metric(results)
            for writer in writers:
                writer.scalars(step, {f"eval/{metric}": value for metric, value in values.items()})
            listed = "  ".join(f"{metric} {shown(metric, value)}" for metric, value in values.items())
            console.say(f"step {step}  {listed}")
        return results

    return evaluate


def finish(
    p: Plan,
    console: Console,
    state: TrainState,
    new_state: Callable[[], TrainState],
    evaluate: Callable[[TrainState, int], Results],
) -> None:
    """Says where everything is, and what the network is worth; an encoder beside the same one untrained."""
    step, c = int(state.step), p.config
    console.say(f"done      {p.workdir} at step {step}")
    if p.evaluator:
        values = by_metric(evaluate(state, step))
        untrained = {} if build.classifies(c) else by_metric(evaluate(new_state(), 0))
        for metric, value in values.items():
            beside = ""
            if untrained:
                beside = f" pretrained, {shown(metric, untrained[metric])} with the same encoder untrained"
            console.say(f"{metric:11} {shown(metric, value)}{beside} ({c.data.source}, {c.data.eval_split})")
    picture = p.workdir / "pictures" / f"reconstruction_{step}.png"
    if picture.exists():
        console.say(f"picture   {picture}")
