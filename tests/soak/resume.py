"""Rows 1 to 10: runs that are stopped, killed and moved, and what comes out of them, bit for bit."""

import contextlib
import hashlib
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image
from zygote import zygote

from soak import Trial, campaign
from soak._digits import (
    BATCH,
    SEED,
    STEPS,
    assert_clean,
    assert_ledger,
    assert_same,
    finish,
    kill_some,
    outcome,
    start,
    undisturbed,
)

POINTS = (
    "step", "save.begin", "save.prepare", "save.copy", "save.copied", "save.write", "save.commit", "save.committed",
    "seal.hash", "seal.draft", "seal.sync", "seal.rename", "seal.renamed", "seal.done", "retain", "retain.renamed",
    "clean", "restore.begin", "restore.done",
)  # fmt: skip


def killed_and_restarted(trial: Trial, processes: int) -> dict[str, float]:
    """One to five kills, then to the end."""
    expected, _, life = undisturbed(processes)
    workdir, kills = trial.folder / "run", 0
    for _ in range(trial.rng.randint(1, 5 if processes == 1 else 2)):
        kills += kill_some(workdir, trial.rng, POINTS, life, processes=processes)
    finish(workdir, processes=processes)
    assert_same(workdir, expected)
    return {"kills": kills}


@campaign(
    row=1, fault="SIGTERM at step k of 24, over two epochs", promise="saved at k, exit 75; then the same bits",
    trials=STEPS - 2, fast="test_resume.py",
)  # fmt: skip
def stopped_at_every_step(trial: Trial) -> None:
    """Trial k stops after step k+2: in the first there is nothing to save yet, and its point is called compile."""
    step, workdir = trial.number + 2, trial.folder / "run"
    text = finish(workdir, code=75, MAEJAX_FAULT=f"step:0:{step - 1}:term")
    assert f"saved step {step};" in text, text[-2000:]
    assert_ledger(workdir, step)
    assert f"resuming at step {step}" in finish(workdir)
    assert_same(workdir, undisturbed()[0])


@campaign(
    row=2, fault="1 to 5 SIGKILLs at any moment and at named points",
    promise="the same command ends with the same bits", trials=100, fast="test_resume.py",
)  # fmt: skip
def killed_at_any_moment(trial: Trial) -> dict[str, float]:
    """Compilation, steps, copies, writes, commits, retention, evaluation, restore."""
    return killed_and_restarted(trial, 1)


@campaign(
    row=3, fault="SIGKILL of one of 2 processes, 0 included, twice", promise="all restarted, the same bits", trials=20,
)  # fmt: skip
def one_of_two_killed(trial: Trial) -> dict[str, float]:
    """Any victim."""
    return killed_and_restarted(trial, 2)


@campaign(
    row=3, fault="SIGKILL of one of 4 processes, 0 included, twice", promise="all restarted, the same bits", trials=10,
)  # fmt: skip
def one_of_four_killed(trial: Trial) -> dict[str, float]:
    """Any victim."""
    return killed_and_restarted(trial, 4)


@campaign(
    row=4, fault="other workers (0, 1, 2, 4), other prefetch", promise="the same batches, three epochs", trials=8,
    fast="test_ledger.py",
)  # fmt: skip
def other_workers(trial: Trial) -> dict[str, float]:
    """Digests of every batch, beside those without workers."""
    expected = _batches(0, 2)
    workers, prefetch = (0, 1, 2, 4)[trial.number % 4], (1, 8)[trial.number // 4]
    assert _batches(workers, prefetch) == expected and len(expected) == 36
    return {"batches": len(expected)}


def _batches(workers: int, prefetch: int, part: int = 0, parts: int = 1, first: int = 0, last: int = 36) -> list[str]:
    return [
        hashlib.sha256(b"".join(key.encode() + rows[key].tobytes() for key in sorted(rows))).hexdigest()
        for rows in _rows(workers, prefetch, part, parts, first, last)
    ]


def _rows(workers: int, prefetch: int, part: int, parts: int, first: int, last: int) -> list[dict[str, np.ndarray]]:
    from maejax.data.masking import Mask
    from maejax.data.pipeline import train_batches
    from maejax.data.sources import make_source
    from maejax.data.transforms import Augment

    augment = Augment(
        size=(16, 16), crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 1.33), flip=True, color_jitter=0.0,
        rand_augment=0.0, fill=(0,), erasing=0.0,
    )  # fmt: skip
    batches = iter(
        train_batches(
            make_source("digits", split="train"), [augment, Mask(sampler="random", grid=(4, 4), visible=4)],
            channels=1, max_pixels=10**6, batch_size=BATCH, seed=SEED, process_index=part, process_count=parts,
            start_step=first, workers=workers, prefetch=prefetch,
        )
    )  # fmt: skip
    try:
        return [dict(next(batches)) for _ in range(first, last)]
    finally:
        with contextlib.suppress(AttributeError):
            batches.close()


@campaign(
    row=5, fault="SIGKILL while workers are far ahead", promise="no record twice, none left out", trials=25,
    fast="test_ledger.py",
)  # fmt: skip
def killed_with_deep_prefetch(trial: Trial) -> dict[str, float]:
    """Two workers with eight batches each; what counts is what a step consumed."""
    flags, workdir, kills = ("--config.data.workers=2", "--config.data.prefetch=16"), trial.folder / "run", 0
    life = undisturbed()[2] + 3
    for _ in range(trial.rng.randint(1, 4)):
        (run,) = start(workdir, *flags)
        deadline = time.monotonic() + trial.rng.uniform(0.5, 1) * life
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        run.kill()
        kills += run.wait() == -9
    finish(workdir, *flags)
    assert_same(workdir, undisturbed()[0])
    return {"kills": kills}


@campaign(
    row=6, fault="another split over processes, from any step", promise="every image has its mask, in its row",
    trials=20, fast="test_processes.py",
)  # fmt: skip
def other_layouts(trial: Trial) -> None:
    """Rows of P processes beside those of one."""
    parts, first = trial.rng.choice((2, 3, 4, 8)), trial.rng.randrange(0, 30)
    whole = _rows(0, 2, 0, 1, first, first + 3)
    split = [_rows(0, 2, part, parts, first, first + 3) for part in range(parts)]
    for step, rows in enumerate(whole):
        for key in rows:
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in split]), rows[key], err_msg=key)


def _photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(64):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8).repeat(2, 0)).save(path)


CHANGES = {
    "moved": True, "a cold cache of compiled programs": True, "a byte changed": False, "an image removed": False,
    "an image added": False, "an image renamed": False,
}  # fmt: skip


@campaign(
    row=7, fault="data moved, cache cold; data changed", promise="the same bits; refused with exit 2", trials=12,
    fast="test_data_sources.py",
)  # fmt: skip
def other_data(trial: Trial) -> None:
    """Each kind of change twice, between two halves of a run."""
    kind = list(CHANGES)[trial.number % len(CHANGES)]
    photos, workdir = trial.folder / "photos", trial.folder / "run"
    _photos(photos)
    flags = [f"--config.data.source={photos}", "--config.data.channels=1", "--config.batch_size=16"]
    flags += ["--config.evals=none", "--config.data.mean=0.5", "--config.data.std=0.25"]
    finish(trial.folder / "whole", *flags)
    finish(workdir, *flags, code=75, MAEJAX_FAULT=f"step:0:{trial.rng.randint(2, STEPS - 2)}:term")
    more, victim = {}, photos / "a" / f"{2 * trial.rng.randrange(32)}.png"
    if kind == "moved":
        photos.rename(trial.folder / "elsewhere")
        flags[0] = f"--config.data.source={trial.folder / 'elsewhere'}"
    elif kind == "a cold cache of compiled programs":
        more["JAX_COMPILATION_CACHE_DIR"] = str(trial.folder / "cache")
    elif kind == "a byte changed":
        content = bytearray(victim.read_bytes())
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
        victim.write_bytes(content)
    elif kind == "an image removed":
        victim.unlink()
    elif kind == "an image added":
        shutil.copy(victim, photos / "a" / "new.png")
    else:
        victim.rename(photos / "a" / "zz.png")
    if CHANGES[kind]:
        finish(workdir, *flags, **more)
        got, expected = outcome(workdir), outcome(trial.folder / "whole")
        assert got[1] == expected[1]
        for name in got[0]:
            np.testing.assert_array_equal(got[0][name], expected[0][name], err_msg=name)
    else:
        text = finish(workdir, *flags, code=2)
        assert "the images are not those that" in text, text[-2000:]


@campaign(
    row=8, fault="devices 1, 8, 2, 4 in turn, other meshes",
    promise="the same records in order, losses to 1e-5", trials=5, fast="test_resume.py",
)  # fmt: skip
def other_devices(trial: Trial) -> dict[str, float]:
    """Six steps on each."""
    workdir = trial.folder / "run"
    for leg, devices in enumerate((1, 8, 2, 4)):
        split = trial.rng.choice([s for s in (1, 2, 4) if devices % s == 0])
        flags = [f"--config.mesh.fsdp={split}", f"--config.sharding={trial.rng.choice(('zero1', 'fsdp', 'replicate'))}"]
        last = leg == 3
        fault = {} if last else {"MAEJAX_FAULT": f"step:0:{STEPS // 4 - 1}:term"}
        finish(workdir, *flags, code=0 if last else 75, devices=devices, **fault)
        assert_ledger(workdir, (leg + 1) * STEPS // 4)
    return {"largest relative difference of a loss": _far_from_undisturbed(workdir)}


def _far_from_undisturbed(workdir: Path) -> float:
    losses, expected = (
        np.array([line["train/loss"] for line in lines if "train/loss" in line])
        for lines in (outcome(workdir)[1], undisturbed()[0][1])
    )
    assert len(losses) == STEPS
    far = float(np.max(np.abs(losses / expected - 1)))
    assert far <= 1e-5, far
    assert_clean(workdir)
    return far


@campaign(
    row=9, fault="processes 1, 2, 4, 2 in turn", promise="the same records in order, losses to 1e-5", trials=5,
    fast="test_processes.py",
)  # fmt: skip
def other_processes(trial: Trial) -> dict[str, float]:
    """Six steps on each."""
    workdir = trial.folder / "run"
    for leg, processes in enumerate((1, 2, 4, 2)):
        last = leg == 3
        fault = {} if last else {"MAEJAX_FAULT": f"step:{trial.rng.randrange(processes)}:{STEPS // 4}:term"}
        finish(workdir, processes=processes, code=0 if last else 75, **fault)
        (step,) = [max(int(p.name) for p in (workdir / "checkpoints").iterdir())]
        assert_ledger(workdir, step)
    return {"largest relative difference of a loss": _far_from_undisturbed(workdir)}


@campaign(
    row=10, fault="processes and devices that do not divide the batch",
    promise="refused with the numbers that do, no device started", trials=30, fast="test_mesh.py",
)  # fmt: skip
def impossible_topologies(trial: Trial) -> dict[str, float]:
    """As a user's command."""
    while True:
        processes, devices = trial.rng.randint(1, 8), trial.rng.randint(1, 8)
        batch = trial.rng.choice((12, 16, 60, 100, 256))
        if batch % (processes * devices):
            break
    log, before = trial.folder / "log", time.monotonic()
    env = {"JAX_PLATFORMS": "cpu", "MAEJAX_NUM_PROCESSES": str(processes), "MAEJAX_PROCESS_ID": "0"}
    run = zygote().start(
        "pretrain", "--config=pretrain_digits", f"--config.batch_size={batch}", f"--workdir={trial.folder / 'run'}",
        log=log, devices=devices, MAEJAX_COORDINATOR="127.0.0.1:1", **env,
    )  # fmt: skip
    assert run.wait(60) == 2, run.text()
    seconds = time.monotonic() - before
    assert run.text().startswith(f"maejax: batch_size={batch} cannot be split over {processes} process"), run.text()
    assert run.text().count("\n") == 1 and not (trial.folder / "run").exists()
    legal = run.text().split("; ")[1].removesuffix(" would do\n").split(", ")
    assert [int(number) for number in legal] == [n for n in range(1, batch + 1) if batch % n == 0][: len(legal)]
    return {"seconds": seconds}
