"""The run that campaigns of resume and checkpoints break: 24 steps, two epochs of the digits, a few seconds."""

import functools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from zygote import Run, zygote

from maejax.ledger import expected_chain
from maejax.manifest import MANIFEST, read_meta, sealed_steps, verify

STEPS, SAVED, BATCH, IMAGES, SEED = 24, 4, 120, 1438, 3
TINY = (
    "pretrain", "--config=pretrain_digits", "--config.total_epochs=None", "--config.warmup_epochs=None",
    f"--config.total_steps={STEPS}", "--config.warmup_steps=4", f"--config.batch_size={BATCH}",
    f"--config.seed={SEED}", "--config.model.width=16", "--config.model.depth=2", "--config.decoder.width=16",
    "--config.decoder.depth=1", "--config.log_steps=1", f"--config.save_steps={SAVED}", "--config.keep_checkpoints=2",
    "--config.evals=knn", "--config.eval_steps=12", "--config.eval_images=64", "--config.tensorboard=false",
    "--config.picture_steps=1000", "--config.optimizer.ema_decay=0.9",
)  # fmt: skip


def start(workdir: Path, *flags: str, processes: int = 1, **more: Any) -> list[Run]:
    """The processes of a run, or of the next attempt of it."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    arguments = (*TINY, f"--workdir={workdir}", *flags)
    # A log for each attempt: workers that outlive a killed one for a moment may have something to say.
    log = workdir.parent / f"log-{len(list(workdir.parent.glob('log-*')))}"
    if processes == 1:
        return [zygote().start(*arguments, log=log, **more)]
    return zygote().start_several(processes, *arguments, log=log, **more)


def finish(workdir: Path, *flags: str, processes: int = 1, code: int = 0, **more: Any) -> str:
    """Runs to the end; what process 0 printed in this attempt."""
    runs = start(workdir, *flags, processes=processes, **more)
    codes = [run.wait() for run in runs]
    text = runs[0].text()
    assert codes == [code] * processes, f"{codes}\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    return text


def kill_some(workdir: Path, rng: random.Random, points: Sequence[str], life: float, *, processes: int = 1) -> int:
    """Starts the run and kills it at a moment of its life, or at one of the points; 1 if it was still alive then."""
    victim, env = rng.randrange(processes), {}
    at_point = rng.random() < 0.5
    if at_point:
        env["MAEJAX_FAULT"] = f"{rng.choice(points)}:{victim}:{rng.randint(1, 4)}:kill"
    runs = start(workdir, processes=processes, **env)
    deadline = time.monotonic() + (120 if at_point else rng.uniform(0, life))
    while runs[victim].poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    alive = runs[victim].poll() is None
    runs[victim].kill()
    died = runs[victim].wait() == -9
    if processes > 1 and died:
        time.sleep(rng.uniform(0, 0.5))  # the others go on alone for a moment
        for run in runs:
            run.kill()
    codes = [run.wait() for run in runs]
    assert all(code <= 0 for code in codes) or died, f"{codes}: {runs[0].text()[-3000:]}"
    return int(alive or died)


def outcome(workdir: Path, step: int = STEPS) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Everything in a checkpoint, and every logged number that is not about speed."""
    import jax
    import orbax.checkpoint as ocp

    from maejax.tree import named_leaves

    folder = workdir / "checkpoints" / str(step)
    verify(folder)
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}, kept


def assert_same(workdir: Path, expected: tuple[dict[str, np.ndarray], list[dict[str, Any]]]) -> None:
    """Bit for bit; and nothing is left of what was broken off."""
    arrays, lines = outcome(workdir)
    assert arrays.keys() == expected[0].keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], expected[0][name], err_msg=name)
    assert lines == expected[1]
    assert_ledger(workdir)
    assert_clean(workdir)


def assert_ledger(workdir: Path, step: int = STEPS) -> None:
    """The records that were consumed are those of the order, each in its place."""
    chain = expected_chain(num_examples=IMAGES, seed=SEED, batch_size=BATCH, steps=step)
    assert read_meta(workdir / "checkpoints" / str(step))["ledger"] == chain


def assert_clean(workdir: Path) -> None:
    """Only sealed checkpoints, and no draft anywhere."""
    folder = workdir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {str(step) for step in sealed_steps(folder)}
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name or path.name == f"{MANIFEST}.draft"]


@functools.cache
def undisturbed(processes: int = 1) -> tuple[tuple[dict[str, np.ndarray], list[dict[str, Any]]], Path, float]:
    """What comes out if nothing happens, where it is, and how many seconds it lives."""
    for attempt in ("cold", "warm"):
        workdir = Path(tempfile.mkdtemp(prefix=f"soak-{attempt}-")) / "run"
        before = time.monotonic()
        finish(workdir, processes=processes)
        life = time.monotonic() - before
    got = outcome(workdir)
    assert [line["step"] for line in got[1] if "train/loss" in line] == list(range(1, STEPS + 1))
    assert_ledger(workdir)
    return got, workdir, life
