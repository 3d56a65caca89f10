"""Sweeps: what a grid means, what is refused before anything runs, what survives a kill, and what ranks."""

import csv
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from maejax import local, ranking, sweep
from maejax.cli import main
from maejax.errors import Preempted, UsageError
from maejax.sweep import Point, Request, Sweep
from maejax.workdir import lock

ROOT = Path(__file__).parents[1]
TINY = (
    "--config=pretrain_digits", "--config.steps=40", "--config.warmup_steps=2", "--config.batch_size=16",
    "--config.model.width=32", "--config.model.depth=1", "--config.decoder.width=16", "--config.eval_images=200",
    "--config.log_steps=5", "--config.save_steps=10", "--config.tensorboard=false",
)  # fmt: skip
GRID = ("--grid", "config.mask.ratio=0.5,0.75")


# ---- Grids ----------------------------------------------------------------------------------------------------------


def test_grids_are_products_and_pairs_and_seeds_are_always_combined():
    grid = sweep.parse_grid(["config.mask.ratio=0.5, 0.75", "decoder.depth=1,2"], "0,1")
    assert grid == {"mask.ratio": ["0.5", "0.75"], "decoder.depth": ["1", "2"], "seed": ["0", "1"]}
    points = sweep.expand(grid, paired=False)
    assert len(points) == 8 and points[1] == {"mask.ratio": "0.5", "decoder.depth": "1", "seed": "1"}
    assert points[-1] == {"mask.ratio": "0.75", "decoder.depth": "2", "seed": "1"}
    assert sweep.expand(grid, paired=True) == [
        {"mask.ratio": ratio, "decoder.depth": depth, "seed": seed}
        for ratio, depth in (("0.5", "1"), ("0.75", "2"))
        for seed in "01"
    ]
    assert sweep.expand({"seed": ["3", "4"]}, paired=True) == [{"seed": "3"}, {"seed": "4"}]
    assert list(sweep.parse_grid(["epochs=1,2"], None)) == ["total_epochs"]


def test_names_are_readable_and_fit_for_folders():
    assert sweep.name_of({"mask.ratio": "0.5"}, None) == "ratio=0.5"
    assert sweep.name_of({"mask.ratio": "0.5"}, 1) == "ratio=0.5,seed=1"
    assert sweep.name_of({"model.width": "32", "decoder.width": "8"}, None) == "model.width=32,decoder.width=8"
    assert sweep.name_of({"data.source": "folder:/a b/../c"}, None) == "source=folder--a-b-..-c"
    assert sweep.name_of({}, 2) == "seed=2"
    values = [sweep.shown(x) for x in ((32, 48), 0.50, 1e-7, True, None, "x")]
    assert values == ["32x48", "0.5", "1e-07", "true", "none", "x"]


# ---- Mistakes: one line that names the point, before anything runs --------------------------------------------------

MISTAKES = [
    ([], "say what to vary"),
    (["--grid", "config.mask.raito=0.5,0.6"], "point mask.raito=0.5: unknown key --config.mask.raito; did you mean"),
    (["--grid", "config.mask.ratio="], "--grid config.mask.ratio= lacks a value"),
    (["--grid", "config.mask.ratio=0.5,,0.6"], "lacks a value"),
    (["--grid", "config.mask.ratio"], "lacks a value"),
    ([*GRID, "--seeds="], "--seeds= lacks a value"),
    (["--grid", "mask.ratio=0.5,0.50"], "point mask.ratio=0.50 is there twice"),
    ([*GRID, "--seeds=1,1"], "point mask.ratio=0.5,seed=1 is there twice"),
    ([*GRID, *GRID], "mask.ratio and mask.ratio are one dimension"),
    (["--grid", "total_epochs=1,2", "--grid", "steps=1,2"], "total_steps and total_epochs are one dimension"),
    (["--grid", "mask.ratio=0.5,1.5"], "point mask.ratio=1.5: mask.ratio=1.5 must lie between 0 and 1"),
    (["--grid", "image_size=16,17x16"], "point image_size=17x16: image height 17 is not divisible"),
    (["--grid", "mask.sampler=random,rnd"], "point mask.sampler=rnd: mask.sampler='rnd' is not one of"),
    (["--grid", "data.split=train,nosuch"], "point data.split=nosuch: "),
    ([*GRID, "--config.mask.ratio=0.6"], "--config.mask.ratio=0.6 is for all points"),
    (["--grid", "epochs=1,2"], "--config.steps=40 is for all points, and --grid varies total_epochs"),
    (["--zip", *GRID, "--grid", "decoder.depth=1,2,3"], "--zip needs lists of one length: mask.ratio has 2, decoder"),
    ([*GRID, "--evaluate=knm"], "point mask.ratio=0.5: evals='knm' is not one of"),
    ([*GRID, "--on=moon"], "--on='moon' is not one of local, slurm, tpu-vm, jobset, skypilot"),
    ([*GRID, "--launch=--nodes=2"], "--launch is for the other places; name one with --on"),
    ([*GRID, "--on=slurm", "--launch=--nodes='2"], "--launch=--nodes='2: No closing quotation"),
    ([*GRID, "--jobs=0"], "--jobs=0 must be 1 or more"),
    ([*GRID, "--verb=reconstruct"], "--verb='reconstruct' is not one of pretrain, finetune"),
    ([*GRID, "mask.ratio=0.5"], "write --config.mask.ratio=0.5"),
    ([*GRID, "--json"], "--json and --csv are for --show"),
    ([*GRID, "--from=nosuch"], "point ratio=0.5: "),
]


@pytest.fixture
def no_device(monkeypatch):
    def touched(*_, **__):
        raise RuntimeError("a device was touched")

    for name in ("devices", "local_devices", "device_count", "local_device_count", "default_backend"):
        monkeypatch.setattr(jax, name, touched)
    monkeypatch.setattr(subprocess, "Popen", touched)


@pytest.mark.parametrize("flags, says", MISTAKES, ids=[" ".join(m[0])[:60] for m in MISTAKES])
def test_mistakes(flags, says, tmp_path, capsys, no_device, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--workdir=new", *TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("maejax: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(tmp_path, capsys, no_device):
    (tmp_path / "thesis.tex").write_text("precious")
    for arguments, says in (
        (["sweep", f"--workdir={tmp_path}", *TINY, *GRID], "is not empty and not a sweep"),
        (["sweep", str(tmp_path)], "is not a sweep: it has no sweep.json"),
        (["sweep", str(tmp_path), "--show"], "is not a sweep"),
        (["sweep", str(tmp_path), "--seeds=1"], "say what to sweep over"),
        (["sweep"], "say where the runs go"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


# ---- A child that trains nothing, to see what a sweep does with its children ----------------------------------------

CHILD = f"""#!{sys.executable} -S
import json, os, pathlib, signal, sys, time
value = {{a.partition("=")[0]: a.partition("=")[2] for a in sys.argv}}
run, ratio = pathlib.Path(value["--workdir"]), value["--config.mask.ratio"]
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text("{{}}")
print("hello from", run.name, flush=True)
if (run / "taken").exists():  # as an orphan that was still importing when the sweep looked
    import fcntl
    (run / "taken").unlink()
    file = (run / ".lock").open("a")
    if os.fork() == 0:
        fcntl.flock(file, fcntl.LOCK_EX)
        (run / "held").touch()
        time.sleep(0.5)
        os._exit(0)
    while not (run / "held").exists():
        time.sleep(0.01)
    print("maejax: another run is writing to", run)
    os._exit(2)
if ratio == "0.6" and not (run.parent / "repaired").exists():
    print("maejax: train/loss is nan at step 3", file=sys.stderr)
    sys.exit(70)
if ratio == "0.9" and not (run / "stopped").exists():
    def stop(*_):
        (run / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (run / "ready").touch()
    time.sleep(30)
    sys.exit(1)
(run / "checkpoints/40").mkdir()
(run / "checkpoints/40/manifest.json").write_text("{{}}")
(run / "evals").mkdir()
worth = float(ratio) + 0.02 * int(value.get("--config.seed", 0))
for step in (0, 40):
    (run / f"evals/knn_{{step}}.json").write_text(json.dumps({{"metrics": {{"knn_top1": worth}}}}))
(run / "metrics.jsonl").write_text(json.dumps({{"step": 40, "train/loss": worth, "perf/img_per_sec": 5.0}}) + "\\n")
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`python -m maejax` is a script that writes what a run leaves behind."""
    script = tmp_path / "child"
    script.write_text(CHILD)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def command(workdir: Path, ratios: str, *flags: str) -> list[str]:
    return ["sweep", f"--workdir={workdir}", *TINY, "--grid", f"config.mask.ratio={ratios}", "--evaluate=knn", *flags]


def test_a_broken_point_is_reported_and_the_others_go_on(tmp_path, child, capsys):
    work = tmp_path / "sweep"
    assert main(command(work, "0.5,0.6,0.75", "--seeds=0,1", "--jobs=2")) == 1
    out, err = capsys.readouterr()
    assert "ratio=0.6: broken after" in out and "exit code 70: train/loss is nan at step 3" in out
    assert "2 of 6 points are broken: ratio=0.6, ratio=0.6,seed=1" in err and err.count("\n") == 1
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert table[0] == ["rank", "mask.ratio", "knn_top1", "seeds", "state"]
    assert table[2] == ["1", "0.75", "76.00 % ± 1.41", "0, 1", "done"]  # 0.75 and 0.77
    assert table[3] == ["2", "0.5", "51.00 % ± 1.41", "0, 1", "done"]
    assert table[4][:2] == ["", "0.6"] and "seed 0 broken: exit code 70: train/loss is nan at step 3" in table[4][-1]
    assert "ranked by knn_top1: never by loss, which is not of one task for every mask.ratio" in out
    assert {p.name for p in work.iterdir() if "=" in p.name} == {
        f"ratio={ratio}{seed}" for ratio in (0.5, 0.6, 0.75) for seed in ("", ",seed=1")
    }

    # Started again by its folder alone, only what is missing runs.
    (work / "repaired").touch()
    assert main(["sweep", str(work)]) == 0
    out = capsys.readouterr().out
    assert out.count(": starting") == 2 and out.count(": done in") == 2 and not sweep.failures(work)
    assert (work / "logs/ratio=0.5.txt").read_text().count("hello") == 1
    assert (work / "logs/ratio=0.6.txt").read_text().count("hello") == 2

    # Machines are told the same.
    assert main(["sweep", str(work), "--show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranked_by"] == "knn_top1" and [row["rank"] for row in found["rows"]] == [1, 2, 3]
    assert found["rows"][0]["metrics"]["knn_top1"]["values"] == [0.75, 0.77]
    assert found["rows"][0]["metrics"]["loss"]["mean"] == pytest.approx(0.76)  # there, but no rank follows it
    assert main(["sweep", str(work), "--show", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["mask.ratio"] for row in rows] == ["0.75", "0.6", "0.5"] and rows[0]["seeds"] == "0 1"
    assert float(rows[0]["knn_top1_spread"]) == pytest.approx(statistics.stdev([0.75, 0.77]))


def test_points_may_be_added_and_none_left_out(tmp_path, child, capsys):
    work = tmp_path / "sweep"
    assert main(command(work, "0.5")) == 0
    assert main(command(work, "0.5,0.75", "--seeds=0,1")) == 0
    assert "ratio=0.5: starting" in (out := capsys.readouterr().out) and out.count("[1/4] ratio=0.5:") == 0
    assert (work / "logs/ratio=0.5.txt").read_text().count("hello") == 1
    # A dimension more: what computes the same keeps its folder.
    more = [*command(work, "0.5,0.75", "--seeds=0,1"), "--grid", "decoder.depth=1,2"]
    assert main(more) == 0
    assert [p.name for p in sweep.read(work).points][:3] == ["ratio=0.5", "ratio=0.5,seed=1", "ratio=0.5,depth=2"]
    assert sweep.read(work).points[0].settings == {"mask.ratio": "0.5", "decoder.depth": "1"}
    capsys.readouterr()
    assert main(command(work, "0.75", "--seeds=0,1")) == 2
    error = capsys.readouterr().err
    assert "whose point ratio=0.5 this one lacks" in error and "mask.ratio was 0.5, now 0.75" in error
    assert main([*more, "--config.decoder.heads=2"]) == 2
    assert "(decoder.heads was 4, now 2)" in capsys.readouterr().err


def test_sigterm_reaches_the_children_and_ends_with_75(tmp_path, child, capsys):
    work = tmp_path / "sweep"

    def terminate():
        while not (work / "ratio=0.9/ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    assert main(command(work, "0.9,0.5")) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    out, err = capsys.readouterr()
    assert "ratio=0.9: stopped after" in out and f"SIGTERM: what was under way is saved; maejax sweep {work}" in err
    assert (work / "ratio=0.9/stopped").exists() and not (work / "ratio=0.5").exists()
    assert main(["sweep", str(work), "--show"]) == 0
    out = capsys.readouterr().out
    assert "unfinished at step 0 of 40" in out and "waiting" in out and "not ranked" in out
    assert main(["sweep", str(work)]) == 0


def test_a_point_that_another_process_trains_is_waited_for(tmp_path, child, capsys):
    work = tmp_path / "sweep"
    assert main(command(work, "0.6")) == 1
    (work / "repaired").touch()
    held = lock(work / "ratio=0.6")
    threading.Timer(0.5, held.close).start()
    assert main(["sweep", str(work)]) == 0
    out = capsys.readouterr().out
    assert out.index("another process is at it; waiting") < out.index("ratio=0.6: done in")
    held = lock(work)
    assert main(["sweep", str(work)]) == 2
    held.close()

    # It may be so young that it does not hold the folder yet when the sweep looks.
    (work / "ratio=0.75").mkdir()
    (work / "ratio=0.75" / "config.json").write_text("{}")
    (work / "ratio=0.75" / "taken").touch()
    capsys.readouterr()
    assert main(command(work, "0.6,0.75")) == 0
    out = capsys.readouterr().out
    assert "broken" not in out and out.index("at it; waiting") < out.index("ratio=0.75: done in")


# ---- The table ------------------------------------------------------------------------------------------------------


def a_sweep(
    folder: Path, found: dict[tuple, dict[str, float] | None], keys: tuple[str, ...], evals=("linear",)
) -> Sweep:
    """A sweep with these numbers: {(values of the keys ..., seed): metrics}; None is not done."""
    points = []
    for (*values, seed), metrics in found.items():
        settings = dict(zip(keys, values, strict=True))
        name = sweep.name_of(settings, seed)
        run = folder / name
        point = Point(
            name=name, workdir=run, settings=settings, seed=seed, steps=9, evals=evals, computes=settings, arguments=()
        )
        points.append(point)
        if metrics is None:
            continue
        (run / "checkpoints/9").mkdir(parents=True)
        (run / "checkpoints/9/manifest.json").touch()
        (run / "evals").mkdir()
        for name in evals:
            for step in (0, 9):
                content = {"metrics": {f"{name}_top1": metrics[name]}}
                (run / f"evals/{name}_{step}.json").write_text(json.dumps(content))
        lines = [{"step": 3, "train/loss": 9.0}, {"step": 9, "train/loss": metrics["loss"]}, {"step": 9, "eval/x": 1}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": ')
    made = Sweep(workdir=folder, request=Request(assignments={}, grid={}), points=tuple(points))
    sweep.write(made)
    return sweep.read(folder)


def test_the_lowest_loss_does_not_win_where_losses_are_of_other_tasks(tmp_path):
    numbers = {("0.5", 0): {"linear": 0.6, "loss": 0.1}, ("0.9", 0): {"linear": 0.7, "loss": 0.9}}
    found = ranking.rank(a_sweep(tmp_path / "a", numbers, ("mask.ratio",)))
    assert [row.settings["mask.ratio"] for row in found.rows] == ["0.9", "0.5"] and found.metrics == ("linear_top1",)
    assert found.why == "ranked by linear_top1: never by loss, which is not of one task for every mask.ratio"
    # Without evaluations there is no ranking then, and there is one by loss where the task is one.
    found = ranking.rank(a_sweep(tmp_path / "b", numbers, ("mask.ratio",), evals=()))
    assert found.by is None and {row.rank for row in found.rows} == {None} and "not ranked" in found.why
    found = ranking.rank(a_sweep(tmp_path / "c", numbers, ("base_lr",), evals=()))
    assert found.by == "loss" and [row.settings["base_lr"] for row in found.rows] == ["0.5", "0.9"]
    for key in ("mask.sampler", "norm_pix", "objective", "model.patch", "data.crop", "image_size"):
        assert ranking.rank(a_sweep(tmp_path / key, numbers, (key,), evals=())).by is None, key


def test_seeds_are_folded_and_only_whole_rows_rank(tmp_path):
    numbers = {
        ("1", 0): {"linear": 0.5, "knn": 0.9, "loss": 1.0},
        ("1", 1): {"linear": 0.7, "knn": 0.8, "loss": 2.0},
        ("2", 0): {"linear": 0.9, "knn": 0.7, "loss": 1.0},
        ("2", 1): None,
        ("4", 0): {"linear": 0.6, "knn": 0.7, "loss": 1.0},
        ("4", 1): {"linear": 0.6, "knn": 0.7, "loss": 1.0},
    }
    found = ranking.rank(a_sweep(tmp_path, numbers, ("decoder.depth",), evals=("knn", "linear")))
    assert found.by == "linear_top1" and found.metrics == ("linear_top1", "knn_top1", "loss")
    first, second, last = found.rows
    assert (first.rank, second.rank, last.rank) == (1, 1, None)  # equals share a rank
    assert first.mean("linear_top1") == pytest.approx(0.6) and first.spread("linear_top1") == pytest.approx(
        0.1414, rel=1e-3
    )
    assert second.spread("linear_top1") == 0.0 and last.kind == "unfinished" and last.spread("loss") is None
    assert "seed 1 waiting" in ranking.as_text(found)


def test_series_along_a_key(tmp_path):
    numbers = {
        (x, depth, seed): {"linear": y + 0.01 * seed, "loss": 1.0}
        for depth in ("1", "8")
        for x, y in (("0.25", 0.3), ("0.5", 0.5), ("0.75", 0.6))
        for seed in (0, 1)
    }
    found = ranking.rank(a_sweep(tmp_path, numbers, ("mask.ratio", "decoder.depth")))
    along, lines = ranking.series(found, "linear_top1")
    assert along == "mask.ratio" and set(lines) == {"decoder.depth=1", "decoder.depth=8"}
    assert [x for x, _, _ in lines["decoder.depth=1"]] == ["0.25", "0.5", "0.75"]
    (x, mean, spread) = lines["decoder.depth=8"][1]
    assert (x, mean, spread) == ("0.5", pytest.approx(0.505), pytest.approx(0.00707, rel=1e-3))


def test_elsewhere_each_point_gets_a_file_that_launch_makes(tmp_path, capfd):
    workdir = tmp_path / "sweep"
    flags = [*TINY, *GRID, "--on=slurm", "--launch=--nodes=2 --time=60"]
    assert main(["sweep", f"--workdir={workdir}", *flags]) == 0
    out = capfd.readouterr().out
    for ratio in ("0.5", "0.75"):
        file = workdir / f"ratio={ratio}" / "launch" / "slurm.sbatch"
        text = file.read_text()
        assert f"--config.mask.ratio={ratio}" in text and f"--workdir={workdir}/ratio={ratio}" in text
        assert "#SBATCH --nodes=2" in text and f"submit  sbatch {file}" in out
    assert main(["sweep", str(workdir), "--show"]) == 0
    assert capfd.readouterr().out.count("waiting") == 2


# ---- For real -------------------------------------------------------------------------------------------------------

EIGHT = ("--grid", "config.mask.ratio=0.3,0.5,0.75,0.9", "--seeds=0,1", "--evaluate=knn,linear")


def start(workdir: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "maejax", "sweep", f"--workdir={workdir}", *TINY, *EIGHT],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def table_of(workdir: Path, capsys) -> str:
    assert main(["sweep", str(workdir), "--show", "--csv"]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_a_sweep_killed_twice_ends_with_the_same_table(tmp_path, capsys):
    """4 points x 2 seeds on the digits: once with nothing but the sweep killed, once with its child, too."""
    out, _ = start(tmp_path / "undisturbed").communicate()
    assert out.count(": done in") == 8, out
    rng, work = random.Random(0), tmp_path / "killed"
    for orphan in (True, False):
        process = start(work)
        while process.poll() is None and not list(work.glob("*/checkpoints/*/manifest.json")):
            time.sleep(0.05)
        time.sleep(rng.uniform(1, 20))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL) if not orphan else None
    done = [point.name for point in sweep.read(work).points if sweep.state(point).kind == "done"]
    out, _ = start(work).communicate()
    assert 0 < out.count(": done in") <= 8 - len(done), out
    assert not any(f"{name}: starting" in out or f"{name}: resuming" in out for name in done)
    assert table_of(work, capsys) == table_of(tmp_path / "undisturbed", capsys)


@pytest.mark.slow
def test_a_diverging_point_and_a_sweep_over_fine_tuning(tmp_path, capsys):
    work = tmp_path / "rates"
    grid = ["--grid", "base_lr=1e-3,1e30", "--evaluate=knn", "--config.warmup_steps=1"]
    assert main(["sweep", f"--workdir={work}", *TINY, *grid]) == 1
    out, err = capsys.readouterr()
    assert "base_lr=1e+30: broken after" in out and "exit code 70" in out and "1 of 2 points are broken" in err
    flags = ["--config.steps=4", "--config.warmup_steps=0", "--config.batch_size=16", "--config.tensorboard=false"]
    source = f"--from={work / 'base_lr=0.001'}"
    blocks = ["sweep", "--verb=finetune", source, f"--workdir={tmp_path / 'blocks'}", *flags]
    assert main([*blocks, "--grid", "finetune.blocks=0,1,2"]) == 2
    assert "point finetune.blocks=2: finetune.blocks=2 is more than the encoder's 1 blocks" in capsys.readouterr().err
    assert main([*blocks, "--grid", "finetune.blocks=0,1"]) == 0
    assert "ranked by top1" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_signals_of_a_child_alone_leave_it_unfinished(tmp_path, child):
    made = a_sweep(tmp_path / "sweep", {("0.9", 0): None}, ("mask.ratio",))
    point = Point(**vars(made.points[0]) | {"arguments": ("pretrain", "--config.mask.ratio=0.9")})
    made = Sweep(workdir=made.workdir, request=made.request, points=(point,))

    def terminate():
        while not (point.workdir / "ready").exists():
            time.sleep(0.02)
        os.kill(int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1]), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    said: list[str] = []
    with pytest.raises(Preempted, match="seed=0 stopped: what was under way is saved"):
        local.run(made, jobs=1, say=said.append)
    assert "stopped after" in said[-1] and sweep.state(point).kind == "unfinished"


def test_a_damaged_sweep_file_says_what_to_do(tmp_path):
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read .* restore it"):
        sweep.read(tmp_path)
