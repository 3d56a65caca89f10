"""What surrounds the loop of a run: its records, its hooks, its evaluations, its last words."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from maejax import build, hooks, runs, watchdog
from maejax import config as configs
from maejax.checkpoint import Checkpoints
from maejax.evaluate import Results, by_metric
from maejax.faults import fault_point
from maejax.interruption import EvaluationStopped, News, StepEnd, StopWhenAsked, cause
from maejax.ledger import GENESIS
from maejax.metrics import Console, Writer, cut_json_lines, open_writers, shown
from maejax.prepare import Plan
from maejax.processes import any_true, is_primary, share
from maejax.program import Program
from maejax.replicas import CompareReplicas
from maejax.rollback import Record, offset
from maejax.signals import Interruption
from maejax.skips import WatchSkips
from maejax.state import TrainState


def resume_records(p: Plan, first: int, rollbacks: list[Record]) -> list[Writer]:
    """Cuts what was recorded of steps after `first`, which are computed again; opens the sinks of metrics."""
    for file in (p.workdir / "metrics.jsonl", *p.workdir.glob("bad_images*.jsonl")):
        cut_json_lines(file, first)
    for file in p.workdir.glob("skipped*.jsonl"):  # what a rollback undid stays in these
        cut_json_lines(file, first + offset(rollbacks, first + 1), "batch")
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
    program: Program,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    writers: list[Writer],
    console: Console,
    interruption: Interruption,
    draw: Callable[[TrainState, int], None],
    evaluate: Callable[[TrainState, int], Any],
    *,
    first: int,
    meta: dict[str, Any],
) -> list[Callable[[StepEnd], None]]:
    """What happens after every step, in this order: a step is saved when all that belongs to it has been done."""
    c, n, total = p.config, len(p.source), program.total_steps
    news = News(
        interruption, bad_images=meta["bad_images"], ledger=meta.get("ledger", GENESIS), failing=checkpoints.failing
    )
    others = "" if is_primary() else f".{jax.process_index()}"  # files of the other processes have their numbers
    bad_images = hooks.ListBadImages(
        p.workdir / f"bad_images{others}.jsonl", p.source.name, news,
        batch_size=c.batch_size, max_fraction=c.data.max_bad_fraction,
    )  # fmt: skip
    skips = WatchSkips(
        p.workdir / f"skipped{others}.jsonl", console.say, rollbacks=meta["rollbacks"], limit=c.guard.in_a_row
    )
    replicas = CompareReplicas(program.shapes, mesh, every=c.guard.compare_steps)

    def check(end: StepEnd) -> None:
        skips.settle()
        replicas.now(end)

    log = hooks.LogMetrics(
        writers, console, every=configs.steps(c, "log", n), total_steps=total, first_step=first,
        batch_size=c.batch_size, num_examples=n, flops_per_image=build.flops_by_step(c, total), news=news,
    )  # fmt: skip
    save = hooks.SaveCheckpoint(
        checkpoints, log, news, every=configs.steps(c, "save", n), total_steps=total, meta=meta, check=check
    )
    picture = hooks.Periodically(draw, log, every=configs.steps(c, "picture", n), total_steps=total)

    def evaluate_unless_asked(state: TrainState, step: int) -> None:
        try:
            evaluate(state, step)
        except EvaluationStopped:  # it is done when the run goes on
            news.stop = True

    worth = hooks.Periodically(evaluate_unless_asked, log, every=configs.steps(c, "eval", n), total_steps=total)

    def keep_signals(end: StepEnd) -> None:
        for line in interruption.take_back():
            console.say(line)

    def save_and_wait(end: StepEnd) -> None:
        save.save(end, wait=True)
        checkpoints.wait()

    stop = StopWhenAsked(interruption, news, save_and_wait)
    return [keep_signals, news, skips, replicas, bad_images, log, worth, picture, save, stop]


def make_evaluate(
    p: Plan,
    objective: nn.Module,
    mesh: jax.sharding.Mesh,
    writers: list[Writer],
    console: Console,
    interruption: Interruption,
) -> Callable[[TrainState, int], Results]:
    """The function that runs the evaluations that the config asks for, once for every step; step 0 is untrained.

    It raises EvaluationStopped, on all processes, when one was asked to stop.
    """

    def go_on() -> None:
        watchdog.phase("evaluate")
        fault_point("evaluate")
        if any_true(interruption.asked is not None):
            raise EvaluationStopped(f"{cause(interruption)}: the evaluation is done when the same command goes on")

    def evaluate(state: TrainState, step: int) -> Results:
        if p.evaluator is None:
            return {}
        if (known := share(p.evaluator.recorded(p.workdir, step))) is not None:
            return known
        variables = {"params": state.ema or state.params, **state.stats}
        results = p.evaluator(objective, variables, mesh, before_batch=go_on)
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


def catch_up(p: Plan, state: TrainState, first: int, evaluate: Callable[[TrainState, int], Results]) -> None:
    """Evaluates the step that a run goes on from, if the run was asked to stop before that was done."""
    every = configs.steps(p.config, "eval", len(p.source))
    if first and every and first % every == 0:
        evaluate(state, first)


def finish(
    p: Plan,
    console: Console,
    state: TrainState,
    new_state: Callable[[], TrainState],
    evaluate: Callable[[TrainState, int], Results],
) -> None:
    """Says where everything is, and what the network is worth; an encoder beside the same one untrained."""
    watchdog.phase("finish")
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
