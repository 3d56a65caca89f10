"""Rows 15 to 23: checkpoints that are broken off, damaged, and refused by the disk."""

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from zygote import zygote

from maejax.checkpoint import Checkpoints
from maejax.errors import Diverged, UsageError
from maejax.manifest import MANIFEST, CorruptCheckpoint, sealed_steps, verify
from soak import Trial, campaign
from soak._digits import SAVED, STEPS, TINY, assert_same, finish, start, undisturbed
from soak.resume import POINTS

WRITING = POINTS[POINTS.index("save.prepare") : POINTS.index("seal.renamed")]  # where a save can still fail
NAMED = (*(point for point in POINTS if point != "step"), "reject")
NUMBERS = ("ENOSPC", "EACCES", "EIO", "EFBIG")


@campaign(
    row=15, fault="SIGKILL at each of 19 named points of save, commit, retention, restore, quarantine",
    promise="the next start goes on from the newest sealed step, leaves nothing over, ends with the same bits",
    trials=2 * len(NAMED), fast="test_resume.py",
)  # fmt: skip
def killed_at_named_points(trial: Trial) -> None:
    """Every point twice, at a passage drawn at random."""
    killed_at(trial, NAMED[trial.number % len(NAMED)], 1)


@campaign(
    row=15, fault="the same, one of 2 processes", promise="the same", trials=len(NAMED),
)  # fmt: skip
def killed_at_named_points_of_two(trial: Trial) -> None:
    """Process 0 or process 1; some points only process 0 passes."""
    killed_at(trial, NAMED[trial.number % len(NAMED)], 2)


def killed_at(trial: Trial, point: str, processes: int) -> None:
    """A kill at the point, then to the end."""
    workdir, expected = trial.folder / "run", undisturbed(processes)[0]
    last, only_first = 4, ("seal", "retain", "clean", "reject", "save.commit:", "save.prepare")
    if point in ("clean", "restore.begin", "restore.done", "reject"):  # which a first start does not pass
        attempt(workdir, f"seal.hash:0:{trial.rng.randint(2, 4)}:kill", processes)
        last = 1
    if point == "reject":
        (workdir / "checkpoints" / str(sealed_steps(workdir / "checkpoints")[-1]) / MANIFEST).write_text("?")
    victim = 0 if f"{point}:".startswith(only_first) else trial.number % processes
    attempt(workdir, f"{point}:{victim}:{trial.rng.randint(1, last)}:kill", processes)
    sealed = sealed_steps(workdir / "checkpoints")
    if point == "reject" and len(sealed) == 1:
        finish(workdir, processes=processes, code=66)  # it was the only one
        return
    text = finish(workdir, processes=processes)
    if point == "reject":
        assert "is damaged" in text and f"resuming at step {sealed[-2]}" in text
        shutil.rmtree(next((workdir / "checkpoints").glob("rejected-*")))
    else:
        assert (f"resuming at step {sealed[-1]}" in text) if sealed else "resuming" not in text, text[:2000]
        assert "damaged" not in text
    assert_same(workdir, expected)


def attempt(workdir: Path, fault: str, processes: int) -> None:
    """A run with a fault that kills one of its processes, and then the others."""
    victim = int(fault.split(":")[1])
    runs = start(workdir, processes=processes, MAEJAX_FAULT=fault)
    assert runs[victim].wait() == -9, f"{fault} did not happen: {runs[victim].text()[-2000:]}"
    for run in runs:
        run.kill()
        run.wait()


# ---- Damage ---------------------------------------------------------------------------------------------------------


@functools.cache
def copies() -> tuple[Path, Path]:
    """The checkpoints of an undisturbed run: some to be damaged, and the same to mend them from."""
    folder = Path(tempfile.mkdtemp(prefix="soak-damage-"))
    shutil.copytree(undisturbed()[1] / "checkpoints", folder / "run" / "checkpoints")
    shutil.copytree(folder / "run", folder / "good")
    (folder / "run" / ".newest").write_text(f"{STEPS}\n")
    return folder / "run" / "checkpoints", folder / "good" / "checkpoints"


@functools.cache
def store() -> Checkpoints:
    """As a resumed run has it."""
    return Checkpoints(copies()[0], keep=2, say=lambda line: said.append(line))


said: list[str] = []


def files_of(folder: Path) -> list[Path]:
    """All of them, the manifest too."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def found_and_passed_over(name: str) -> None:
    """What a start does with a damaged newest checkpoint; mends it afterwards."""
    damaged, good = copies()
    older, newest = sealed_steps(good)[-2:]
    said.clear()
    assert store().newest()[0] == older  # type: ignore[index]
    assert len(said) == 1 and f"checkpoint {newest} is damaged: " in said[0] and name in said[0], said
    assert (damaged / f"rejected-{newest}" / "reason.txt").read_text().strip() in said[0]
    shutil.rmtree(damaged / f"rejected-{newest}")
    shutil.copytree(good / str(newest), damaged / str(newest))


@campaign(
    row=16, fault="one bit flipped, in any file", promise="found before step 1, set aside, the one before is used",
    trials=1000, fast="test_checkpoint.py",
)  # fmt: skip
def flipped_bits(trial: Trial) -> None:
    """A file and a bit of it at random."""
    newest = copies()[0] / str(STEPS)
    name = trial.rng.choice([name for name in files_of(newest) if (newest / name).stat().st_size])
    content = bytearray((newest / name).read_bytes())
    content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    (newest / name).write_bytes(content)
    found_and_passed_over(str(name))


def damages() -> list[tuple[str, Callable[[], Any]]]:
    """Every truncation, deletion and swap with the files of the checkpoint before."""
    newest, older = copies()[0] / str(STEPS), copies()[0] / str(STEPS - SAVED)
    found: list[tuple[str, Callable[[], Any]]] = []
    for name in files_of(newest):
        content = (newest / name).read_bytes()
        for kept in sorted({0, len(content) // 2, len(content) - 1} - {len(content)}):
            if kept >= 0:
                found.append((str(name), functools.partial((newest / name).write_bytes, content[:kept])))
        if name.name != MANIFEST:  # without one it is not even looked at: `all_bad`
            found.append((str(name), (newest / name).unlink))
        other = older / name
        if other.exists() and other.read_bytes() != content:
            found.append((str(name), functools.partial((newest / name).write_bytes, other.read_bytes())))
    found.append(("is a link", functools.partial(_link, newest / "_METADATA")))
    return found


def _link(path: Path) -> None:
    shutil.copy(path, elsewhere := copies()[1].parent / "elsewhere")
    path.unlink()
    path.symlink_to(elsewhere)


@campaign(
    row=17, fault="a file cut to 0, half, one byte less; deleted; swapped with another step's; made a link",
    promise="as for flipped bits", trials=100, fast="test_checkpoint.py",
)  # fmt: skip
def cut_deleted_swapped(trial: Trial) -> dict[str, float]:
    """All of them in turn."""
    found = damages()
    name, do = found[trial.number % len(found)]
    do()
    found_and_passed_over(name)
    return {"kinds of damage": len(found)}


@campaign(
    row=17, fault="all checkpoints damaged or without a manifest", promise="exit 66, never a fresh start", trials=12,
    fast="test_checkpoint.py",
)  # fmt: skip
def all_bad(trial: Trial) -> None:
    """As a user's command, twice."""
    workdir = trial.folder / "run"
    shutil.copytree(undisturbed()[1], workdir)
    for step in sealed_steps(workdir / "checkpoints"):
        folder = workdir / "checkpoints" / str(step)
        victim = folder / (MANIFEST if trial.number % 3 == 0 else trial.rng.choice(files_of(folder)))
        if trial.number % 3 == 2:
            content = bytearray(victim.read_bytes() or b"x")
            content[trial.rng.randrange(len(content))] ^= 1
            victim.write_bytes(content)
        else:
            victim.unlink()
    metrics = (workdir / "metrics.jsonl").read_bytes()
    for _ in range(2):
        assert "none of the checkpoints in" in finish(workdir, code=66)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


# ---- Disks ----------------------------------------------------------------------------------------------------------


@campaign(
    row=18, fault="ENOSPC, EACCES, EIO, EFBIG at any point of one save", trials=20, fast="test_checkpoint.py",
    promise="a warning, training goes on, older checkpoints untouched, its space freed",
)  # fmt: skip
def one_save_refused(trial: Trial) -> None:
    """Whole runs; every error number five times."""
    workdir = trial.folder / "run"
    number, point = NUMBERS[trial.number % 4], trial.rng.choice(WRITING)
    fault = f"{point}:0:{trial.rng.randint(1, 5)}:raise={number}"
    text = finish(workdir, MAEJAX_FAULT=fault)
    assert text.count("warning: a checkpoint could not be written") == 1, f"{fault}: {text[-3000:]}"
    assert os.strerror(getattr(__import__("errno"), number)) in text
    assert_same(workdir, undisturbed()[0])


@campaign(
    row=18, fault="no save works from some time on", promise="exit 74 after the second, the older checkpoints intact",
    trials=12, fast="test_checkpoint.py",
)  # fmt: skip
def no_save_works(trial: Trial) -> None:
    """By an error number, or by a limit on the size of files, which is a real one."""
    workdir, kind = trial.folder / "run", trial.number % 3
    finish(workdir, code=75, MAEJAX_FAULT=f"step:0:{SAVED + 1}:term")
    before = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
    if kind == 0:
        # Of the same size in every checkpoint; arrays are written in files of any size.
        metadata = max(len(content) for path, content in before.items() if path.name == "_METADATA")
        text = finish(workdir, code=74, file_size=metadata // 2)
    else:
        point, number = trial.rng.choice(WRITING), trial.rng.choice(NUMBERS)
        text = finish(workdir, code=74, MAEJAX_FAULT=f"{point}:0:*:raise={number}")
    assert "two checkpoints in a row could not be written" in text, text[-2000:]
    after = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
    assert after == before
    finish(workdir)  # the disk is well again
    assert_same(workdir, undisturbed()[0])


@campaign(
    row=19, fault="the background writer of one of 2 processes raises", trials=20, fast="test_agreement.py",
    promise="told on both at the next steps; the next save works; nobody hangs",
)  # fmt: skip
def writer_raises(trial: Trial) -> dict[str, float]:
    """Either process, any save but the last."""
    workdir, victim, save = trial.folder / "run", trial.number % 2, trial.rng.randint(1, 5)
    before = time.monotonic()
    text = finish(workdir, processes=2, MAEJAX_FAULT=f"save.write:{victim}:{save}:raise=EIO")
    seconds = time.monotonic() - before
    lines = [line for line in text.splitlines() if line.startswith(("step ", "warning"))]
    (at,) = [i for i, line in enumerate(lines) if line.startswith("warning")]
    assert "Input/output error" in lines[at] and ("process 1" in lines[at]) == (victim == 1), lines[at]
    assert_same(workdir, undisturbed(2)[0])
    return {"seconds of the whole run": seconds}


@campaign(
    row=20, fault="storage that takes 5 s longer", promise="a save delays a step no longer; none is queued", trials=5,
    fast="test_checkpoint.py",
)  # fmt: skip
def slow_storage(trial: Trial) -> dict[str, float]:
    """The time that `save` takes with and without."""
    took = {}
    for name, fault in (("usual", ""), ("slow", "save.write:*:*:sleep=5")):
        saver = Checkpoints(trial.folder / name / "checkpoints", keep=2, say=print)
        state = a_state()
        with faults_here(fault):
            saver.save(at(state, 1), {})
            saver.wait()
            start_time = time.monotonic()
            saver.save(at(state, 2), {})
            took[name] = time.monotonic() - start_time
            saver.wait()
        saver.close()
    assert took["slow"] <= 1.2 * took["usual"] + 0.05, took
    return {"blocked, usual s": took["usual"], "blocked, slow s": took["slow"]}


@campaign(
    row=21, fault="a second run in the same folder", promise="refused with exit 2, naming the holder", trials=10,
    fast="test_cli.py",
)  # fmt: skip
def two_runs(trial: Trial) -> dict[str, float]:
    """While the first one trains."""
    workdir = trial.folder / "run"
    (first,) = start(workdir, MAEJAX_FAULT="step:0:3:sleep=3")
    while "first step after" not in first.text():
        assert first.poll() is None, first.text()
        time.sleep(0.02)
    before = time.monotonic()
    second = zygote().start(*TINY, f"--workdir={workdir}", log=trial.folder / "second.log")
    assert second.wait() == 2, second.text()
    seconds = time.monotonic() - before
    assert f"another run is writing to {workdir} (process {first.pid} on " in second.text()
    assert first.wait() == 0
    assert_same(workdir, undisturbed()[0])
    return {"seconds": seconds}


# ---- States ---------------------------------------------------------------------------------------------------------


@functools.cache
def a_state() -> Any:
    """A TrainState of a few arrays, 40 MB."""
    import jax.numpy as jnp

    from maejax.state import TrainState

    rng = np.random.default_rng(0)
    params = {f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=(1024, 640)), jnp.float32)} for i in range(5)}
    moments = {name: {"mu": leaf["kernel"] * 0.1, "nu": leaf["kernel"] ** 2} for name, leaf in params.items()}
    return TrainState(step=jnp.int32(0), params=params, opt_state=moments, ema={}, stats={})


def at(state: Any, step: int) -> Any:
    """The same at another step."""
    import dataclasses

    import jax.numpy as jnp

    return dataclasses.replace(state, step=jnp.int32(step))


class faults_here:
    """Faults inside this process, for the `with` block."""

    def __init__(self, text: str):
        self._text = text

    def __enter__(self) -> None:
        from maejax import faults

        faults._passages.clear()
        faults._wanted = [tuple(self._text.split(":"))] if self._text else []

    def __exit__(self, *_: object) -> None:
        from maejax import faults

        faults._wanted = []


def some_leaf(state: Any, rng: random.Random, change: Callable[[Any], Any]) -> tuple[str, Any]:
    """The name of an array of a state, and the state with that array changed."""
    from maejax.tree import map_named, named_leaves

    name = rng.choice([name for name, x in named_leaves(state).items() if x.ndim])
    return name, map_named(lambda other, x: change(x) if other == name else x, state)


@campaign(
    row=22, fault="another shape or type of any array", promise="refused by its name", trials=50,
    fast="test_checkpoint.py",
)  # fmt: skip
def other_trees(trial: Trial) -> None:
    """On a checkpoint in this process."""
    import jax
    import jax.numpy as jnp

    saver = Checkpoints(trial.folder / "checkpoints", keep=2, say=print)
    saver.save(at(a_state(), 1), {})
    saver.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), a_state())

    def change(x: Any) -> Any:
        shape = trial.rng.choice([x.shape[::-1], (*x.shape[:-1], x.shape[-1] + 1), x.shape[:-1], x.shape])
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if shape == x.shape else x.dtype, sharding=x.sharding)

    name, wrong = some_leaf(shapes, trial.rng, change)
    try:
        saver.restore(1, wrong)
    except UsageError as error:
        assert f": {name} " in str(error) and "\n" not in str(error)
    else:
        raise AssertionError(f"{name} was restored into another shape or type")
    saver.close()


@campaign(
    row=23, fault="NaN or Inf in any array when it is saved", promise="exit 70, kept as debug-STEP, never resumed from",
    trials=50, fast="test_checkpoint.py",
)  # fmt: skip
def not_finite(trial: Trial) -> None:
    """One number of one array."""
    saver = Checkpoints(trial.folder / "checkpoints", keep=2, say=print)
    saver.save(at(a_state(), 1), {})
    saver.wait()
    place = trial.rng.randrange(1024), trial.rng.randrange(640)
    value = trial.rng.choice([np.nan, np.inf, -np.inf])
    name, bad = some_leaf(at(a_state(), 2), trial.rng, lambda x: x.at[place].set(value))
    try:
        saver.save(bad, {})
    except Diverged as error:
        assert name in str(error) and "debug-2" in str(error)
    else:
        raise AssertionError(f"{name} was saved with {value}")
    assert sealed_steps(saver.folder) == [1] and saver.newest()[0] == 1  # type: ignore[index]
    try:
        verify(saver.folder / "debug-2")
    except CorruptCheckpoint:
        pass
    else:
        raise AssertionError("a debug state was sealed")
    saver.close()
