"""One run, from its config to the last checkpoint, to be read from top to bottom. This is the only loop.

`prepare.plan` checks everything that can be checked without touching a device; `train` does the rest.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maejax import build, hooks, lookout, watchdog
from maejax import config as configs
from maejax.checkpoint import Checkpoints
from maejax.data.desk import Unusable
from maejax.data.transforms import read_faults, records_of
from maejax.describe import describe
from maejax.errors import StorageFailed
from maejax.faults import fault_point
from maejax.interruption import StepEnd
from maejax.ledger import digest, first_row
from maejax.manifest import sealed_steps
from maejax.mesh import make_mesh, to_global
from maejax.metrics import Console
from maejax.prepare import Plan
from maejax.processes import check_same, is_primary, on_primary, share
from maejax.program import Program, make_program
from maejax.rollback import Record, RollBack, Rollbacks, segments
from maejax.start import starting_state
from maejax.state import TrainState
from maejax.surroundings import catch_up, finish, make_evaluate, make_hooks, make_painter, resume_records
from maejax.tree import count
from maejax.workdir import lock, record_start


def train(p: Plan) -> Path:
    """Runs to the end, from the newest checkpoint if there is one; returns the workdir.

    Raises:
      MaejaxError: Preempted, TooManyBadImages, NoValidCheckpoint, Diverged, SilentCorruption or StorageFailed, each
        with its exit code.
    """
    c = p.config
    same = {key: value for key, value in configs.flatten(c) if key not in ("data.dir", "data.workers", "data.prefetch")}
    check_same(same | {"the data": p.source.fingerprint(), "--workdir": str(p.workdir)})
    mesh = make_mesh(c.mesh)
    program = make_program(c, mesh, num_examples=len(p.source), num_classes=p.source.num_classes)

    with lookout.looking_out() as watch, contextlib.ExitStack() as cleanup:
        held = on_primary(lambda: lock(p.workdir))
        if held:
            cleanup.enter_context(held)
        log = p.workdir / "train.log" if is_primary() else None
        console = cleanup.enter_context(Console(log, quiet=not is_primary()))
        checkpoints = Checkpoints(p.workdir / "checkpoints", keep=c.keep_checkpoints, say=console.say)
        cleanup.callback(checkpoints.close)
        for line in (*p.notes, f"run       {p.workdir}", *describe(c, p.source, mesh, count(program.shapes.params))):
            console.say(line)
        on_primary(lambda: record_start(p.workdir, c, f"{jax.device_count()} x {jax.devices()[0].device_kind}"))
        cleanup.push(lambda kind, error, trace: watch.hear_cause(error))
        lookout.write_to(p.workdir, jax.process_index(), console.say, console.keep)

        rollbacks = Rollbacks(
            checkpoints, limit=c.guard.max_rollbacks, in_a_row=c.guard.in_a_row, say=console.say
        )  # fmt: skip
        rollbacks.until_done(lambda: to_the_end(p, mesh, program, checkpoints, rollbacks, console, watch))
    return p.workdir


def to_the_end(
    p: Plan, mesh: jax.sharding.Mesh, program: Program, checkpoints: Checkpoints, rollbacks: Rollbacks,
    console: Console, watch: lookout.Lookout,
) -> None:  # fmt: skip
    """From the newest checkpoint, if there is one, to the last step, and what is to be said then."""
    c, objective, total_steps = p.config, program.objective, program.total_steps
    with contextlib.ExitStack() as cleanup:
        watchdog.phase("restore")
        fault_point("restore")
        state, meta = starting_state(
            checkpoints, p.source, program.new_state, program.shapes, objective,
            config=c, start_from=p.start_from, adapt_weights=p.adapt, say=console.say,
        )  # fmt: skip
        first = int(state.step)
        meta["rollbacks"] = rollbacks.records
        writers = resume_records(p, first, rollbacks.records) if is_primary() else []
        for writer in writers:
            cleanup.callback(writer.close)
        painter = make_painter(p, objective, writers)
        evaluate = make_evaluate(p, objective, mesh, writers, console, watch.interruption)
        at_end = make_hooks(
            p, program, mesh, checkpoints, writers, console, watch.interruption, painter, evaluate,
            first=first, meta=meta,
        )  # fmt: skip
        profile = hooks.Profile(p.workdir / "profile", c.profile_steps, first_step=first)
        cleanup.callback(profile.close)
        cleanup.push(lambda kind, error, trace: None if kind is RollBack else watch.hear_cause(error))
        catch_up(p, state, first, evaluate)
        batches = feed(p, mesh, first, total_steps, rollbacks.records, console.say)
        with contextlib.closing(batches):
            state = loop(program.train_step, state, batches, [profile, *at_end], first)
        watchdog.phase("save")
        checkpoints.wait()
        if total_steps not in share(sealed_steps(checkpoints.folder)):
            raise StorageFailed(f"the last checkpoint could not be written to {checkpoints.folder}; see the log above")
        finish(p, console, state, program.new_state, evaluate)


# ---- The loop -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch on its way to the devices, and what the host knows of it."""

    batch: dict[str, jax.Array]
    faults: list[tuple[int, str]]
    wait: float  # seconds until the host had it
    records: np.ndarray  # int64 (b): the records in this process's rows
    consumed: int  # their digest, for the ledger


def feed(
    p: Plan, mesh: jax.sharding.Mesh, first: int, total: int, rollbacks: Sequence[Record] = (),
    say: Callable[[str], None] = print,
) -> Generator[Fed]:  # fmt: skip
    """The batches of steps `first` to `total`. Transfers overlap with the step that is under way."""
    size, row = p.config.batch_size, first_row(mesh, p.config.batch_size)
    unusable = Unusable(p.workdir / "unusable_records.jsonl")
    for begin, stop, ahead, sized in stretches(p.config, first, total, rollbacks):
        stream = build.training_batches(
            sized, p.source, mesh, first_step=begin + ahead, unusable=unusable, say=say
        )  # fmt: skip
        with contextlib.closing(stream) as batches:
            for step in range(begin, stop):
                watchdog.phase("data", step + 1)
                fault_point("data")
                start = time.perf_counter()
                rows = dict(next(batches))
                wait = time.perf_counter() - start
                faults, records = rows.pop("faults"), rows.pop("index")  # stay on the host: devices have no int64
                places = (step + ahead) * size + (row or 0) + np.arange(len(records))
                consumed = 0 if row is None else digest(places, records_of(records, faults, p.config.data.repeats))
                yield Fed(to_global(rows, mesh), read_faults(faults), wait, records, consumed)


def stretches(
    c: ConfigDict, first: int, total: int, rollbacks: Sequence[Record]
) -> Iterator[tuple[int, int, int, ConfigDict]]:
    """Segments, cut where the images' size changes, too: (start, stop, offset, config of these steps)."""
    for begin, stop, ahead in segments(rollbacks, first, total):
        for start, end, sized in build.parts(c, total):
            if max(begin, start) < min(stop, end):
                yield max(begin, start), min(stop, end), ahead, sized


def loop(
    train_step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Fed],
    at_end: list[Callable[[StepEnd], None]],
    first: int,
) -> TrainState:
    """Every step, and after each its hooks."""
    before: Any = ()
    compiled = None
    for step, fed in enumerate(batches, start=first + 1):
        shape = fed.batch["image"].shape
        watchdog.phase(name := "step" if shape == compiled else "compile", step)
        compiled = shape
        fault_point(name)
        state, metrics = train_step(state, fed.batch)
        with watchdog.waiting():
            # The host may be one step ahead of the devices and no more: their queue is never empty, and never long.
            jax.block_until_ready(before)
            before = metrics
            end = StepEnd(
                step=step, state=state, metrics=metrics, data_wait=fed.wait, faults=fed.faults, records=fed.records,
                consumed=fed.consumed,
            )  # fmt: skip
            for hook in at_end:
                hook(end)
    return state
