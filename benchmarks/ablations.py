"""The paper's ablations on CIFAR-10, a sweep each: tables 1a to 1f, figures 5, 7 and 9.

    python benchmarks/ablations.py --data-dir=DIR --table=mask_ratio                one table, on two CPU cores
    python benchmarks/ablations.py --data-dir=DIR --table=mask_ratio --budget=gpu   longer, two seeds, for one GPU
    python benchmarks/ablations.py --write=docs/ablations.md                        the document, of what has been run

DIR holds TFDS's cifar10, prepared as ArrayRecord. What a table varies, and what the paper found, stands in
configs/ablations/TABLE.py. Every step is a `maejax` command, printed before it runs; a killed one goes on where it
stopped. --budget=try is a few steps, to see whether all works.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import textwrap
from pathlib import Path
from types import ModuleType

from cifar10_study import CIFAR, FINETUNE, Study

from maejax import ranking, sweep

ROOT = Path(__file__).parents[1]
TABLES = (
    "decoder_depth", "decoder_width", "mask_token", "target", "augmentation", "mask_sampling", "mask_ratio",
    "training_length", "finetuned_blocks",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What differs between machines; the shape is ViT width x depth, patch 4."""

    about: str
    pretrain: dict[str, object]
    finetune: dict[str, object]
    seeds: str


CPU = {
    "model.width": 96, "model.depth": 6, "model.heads": 3, "decoder.width": 64, "decoder.depth": 1, "decoder.heads": 4,
    "batch_size": 128, "base_lr": 2e-3, "data.split": "train[:20000]", "data.eval_split": "test[:5000]",
    "eval_images": 5000, "log_steps": 50, "epochs": 4, "warmup_epochs": 0.2, "save_steps": 200, "picture_epochs": 100,
    "tensorboard": "false",
}  # fmt: skip
BUDGETS = {
    "cpu": Budget(
        about="ViT 96 x 6, patch 4, decoder 64 x 1; 4 epochs of 20,000 images unless the table says otherwise, batch "
        "128, float32; linear probe and kNN trained on 5,000 images and scored on 5,000",
        pretrain=CPU,
        finetune={
            "data.split": "train[:10000]", "data.eval_split": "test[:5000]", "epochs": 5, "warmup_epochs": 0.5,
            "batch_size": 64, "log_steps": 50, "save_steps": 200, "eval_epochs": 100, "tensorboard": "false",
        },
        seeds="0",
    ),
    "gpu": Budget(
        about="ViT-Ti/4 (192 x 12), decoder 128 x 2; 50 epochs of 50,000 images unless the table says otherwise, batch "
        "512, bfloat16; linear probe and kNN trained on 50,000 images and scored on 10,000",
        pretrain={
            "decoder.width": 128, "decoder.depth": 2, "decoder.heads": 4, "batch_size": 512, "base_lr": 5e-4,
            "dtype": "bfloat16", "eval_images": 50_000, "log_steps": 100, "epochs": 50, "warmup_epochs": 2.5,
            "save_epochs": 10, "picture_epochs": 1000, "tensorboard": "false",
        },
        finetune={
            "epochs": 25, "warmup_epochs": 2.5, "batch_size": 512, "dtype": "bfloat16", "log_steps": 100,
            "save_epochs": 10, "eval_epochs": 1000, "tensorboard": "false",
        },
        seeds="0,1",
    ),
    "try": Budget(
        about="a few steps; its numbers mean nothing",
        pretrain=CPU | {
            "model.depth": 2, "batch_size": 16, "data.split": "train[:64]", "data.eval_split": "test[:200]",
            "eval_images": 200, "epochs": 1, "save_steps": 50, "warmup_epochs": 0,
        },
        finetune={
            "data.split": "train[:64]", "data.eval_split": "test[:200]", "epochs": 1, "warmup_epochs": 0,
            "batch_size": 16, "eval_epochs": 100, "save_steps": 50, "tensorboard": "false",
        },
        seeds="0",
    ),
}  # fmt: skip


def definition(table: str) -> ModuleType:
    """configs/ablations/TABLE.py."""
    spec = importlib.util.spec_from_file_location(table, ROOT / "configs" / "ablations" / f"{table}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grids(table: str, budget: str) -> dict[str, str]:
    """A table's values by key, as --grid takes them."""
    chosen = {}
    for key, values in definition(table).GRID.items():
        values = values["gpu" if budget == "gpu" else "cpu"] if isinstance(values, dict) else values
        if budget == "try" and key == "finetune.blocks":
            values = [min(value, 2) for value in values[:3]]
        chosen[key] = ",".join(str(value) for value in values)
    return chosen


def run(study: Study, table: str, budget: str) -> Path:
    """The sweep of a table, and before it the run that it starts from, where it needs one."""
    b, grid = BUDGETS[budget], grids(table, budget)
    varied = [f"--grid=config.{key}={values}" for key, values in grid.items()] + [f"--seeds={b.seeds}"]
    varied += ["--zip"] if len(grid) > 1 else []
    fixed = {key: value for key, value in b.pretrain.items() if not any(sweep.same_key(key, other) for other in grid)}
    if getattr(definition(table), "VERB", "pretrain") == "finetune":
        start = study.run("pretrained", "pretrain", f"--config={CIFAR}", config=fixed)
        arguments = ["--verb=finetune", f"--from={start}", f"--config={FINETUNE}", *varied]
        return study.run(table, "sweep", *arguments, config=b.finetune)
    return study.run(table, "sweep", f"--config={CIFAR}", *varied, "--evaluate=knn,linear", config=fixed)


# ---- What came out --------------------------------------------------------------------------------------------------


def rows_in_order(folder: Path) -> list[ranking.Row]:
    """A row a point of the definition, in its order; none if the sweep was not begun."""
    if not sweep.is_sweep(folder):
        return []
    found = ranking.rank(sweep.read(folder))
    by_settings = {json.dumps(row.settings, sort_keys=True): row for row in found.rows}
    asked = dict.fromkeys(json.dumps(point.settings, sort_keys=True) for point in found.sweep.points)
    return [by_settings[settings] for settings in asked]


def report(table: str, folder: Path) -> list[str]:
    """A table as Markdown, with the paper's numbers beside ours and whether they are in the same order."""
    about, rows = definition(table), rows_in_order(folder)
    lines = [f"### {about.PAPER}: {table}", "", (about.__doc__ or "").strip(), ""]
    if not rows:
        return [*lines, "Not run.", ""]
    classifies = "top1" in {name for row in rows for name in row.values} or hasattr(about, "VERB")
    measures = ["top1"] if classifies else ["linear_top1", "knn_top1"]
    keys = list(rows[0].settings)
    heads = [*keys, "in the paper", "its fine-tuning", *(() if classifies else ("its linear",)), *measures]
    lines += [_line([*heads, "images/s", "seeds", "state"]), _line(["---"] * (len(heads) + 3))]
    for row, (label, tuned, linear) in zip(rows, about.POINTS):
        cells = [*(row.settings[key] for key in keys), label, f"{tuned}", *(() if classifies else (f"{linear}",))]
        cells += [ranking.shown_number(name, row.mean(name), row.spread(name)) for name in measures]
        speed = row.mean("img_per_sec")
        seeds = ", ".join(str(point.seed) for point in row.points)
        lines.append(_line([*cells, f"{speed:.0f}" if speed else "", seeds, ranking.describe(row)]))
    paper = [tuned if classifies else linear for _, tuned, linear in about.POINTS[: len(rows)]]
    return [*lines, "", order(paper, [row.mean(measures[0]) for row in rows], rows, measures[0]), *cost(folder), ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def order(paper: list[float], ours: list[float | None], rows: list[ranking.Row], measure: str) -> str:
    """Whether ours are in the paper's order: how many of the pairs that differ there, and how many beyond chance."""
    if any(value is None for value in ours):
        return "Not all points are done, so nothing is said of the order."
    got = [value for value in ours if value is not None]
    pairs = [(i, j) for i, j in itertools.combinations(range(len(got)), 2) if paper[i] != paper[j]]
    same = [(i, j) for i, j in pairs if (paper[i] - paper[j]) * (got[i] - got[j]) > 0]
    images = scored_on(rows, measure)
    error = max(math.sqrt(value * (1 - value) / images) for value in got)
    clear = [(i, j) for i, j in pairs if abs(got[i] - got[j]) > 2 * math.sqrt(2) * error]
    against = [pair for pair in clear if pair not in same]
    best = got.index(max(got)) == paper.index(max(paper))
    verdict = "The paper's ordering holds" if len(same) == len(pairs) else "The paper's ordering does not hold in full"
    return (
        f"**{verdict}** at this scale ({measure}): {len(same)} of {len(pairs)} pairs are in its order, and the best "
        f"point is {'the same' if best else 'another one'}. {images:,} test images give each number a standard error "
        f"of {100 * error:.1f} points at most; {len(clear)} of the pairs differ by more than twice that of a "
        f"difference, {len(against)} of them against the paper."
    )


def scored_on(rows: list[ranking.Row], measure: str) -> int:
    """How many test images a measure was scored on."""
    name = {"top1": "accuracy", "linear_top1": "linear", "knn_top1": "knn"}[measure]
    point = rows[0].points[0]
    return json.loads((point.workdir / "evals" / f"{name}_{point.steps}.json").read_text())["images"]["test"]


def cost(folder: Path) -> list[str]:
    """What a table took and where, from what was recorded beside it."""
    file = folder / "cost.json"
    environments = sorted(folder.glob("*/env.json"))
    if not file.exists() or not environments:
        return []
    spent, e = json.loads(file.read_text()), [json.loads(path.read_text()) for path in environments]
    commits = sorted({str(one["commit"]) for one in e})
    return [
        "",
        f"{spent['wall_minutes']:.0f} minutes, {spent['cpu_minutes']:.0f} CPU-minutes; {e[0]['devices']}, "
        f"{e[0]['cores']} cores; jax {e[0]['versions']['jax']}; {spent['date']}; commit {', '.join(commits)}.",
    ]


def document(folder: Path) -> str:
    """docs/ablations.md, of what is in the folder."""
    lines = [
        "# The paper's ablations on CIFAR-10",
        "",
        "Made by `python benchmarks/ablations.py --write=docs/ablations.md` from the runs themselves; what was not run "
        "says so. The paper's numbers are of ViT-L/16 on ImageNet-1K (accuracy in per cent, fine-tuned and linear "
        "probe), 800 epochs unless said: what can be compared is the order, not the numbers. Ours are linear probes "
        "and kNN on frozen features (top1: fine-tuned), on JPEG re-encodings of CIFAR-10 if that is what DIR held. "
        "The number after ± is the standard deviation over seeds. Images per second are of training, as measured, on a "
        "machine that may have had other work.",
        "",
    ]
    for budget in ("cpu", "gpu"):
        lines += [f"## --budget={budget}", "", f"{BUDGETS[budget].about}. Seeds: {BUDGETS[budget].seeds}.", ""]
        for table in TABLES:
            lines += report(table, folder / budget / table)
    wrapped = [line if line.startswith("|") else textwrap.fill(line, 118, break_on_hyphens=False) for line in lines]
    return "\n".join(wrapped).rstrip() + "\n"


def main() -> None:
    """Runs what is missing of a table and prints it, or writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document of all tables and run nothing")
    options = parser.parse_args()
    workdir = options.workdir.absolute()
    if options.write:
        options.write.write_text(document(workdir))
        return
    if not options.table or not options.data_dir:
        parser.error("--table and --data-dir are needed to run one")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    study = Study(workdir / options.budget, options.data_dir.absolute(), dry=False)
    print("\n".join(report(options.table, run(study, options.table, options.budget))))


if __name__ == "__main__":
    main()
