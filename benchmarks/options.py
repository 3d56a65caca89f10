"""Options that change the function: what each gains in speed and costs in quality, beside the paper's method.

    python benchmarks/options.py --part=speed --out=FILE
    python benchmarks/options.py --part=quality --data-dir=DIR --out=FILE [--only=faithful,cross-third]
    python benchmarks/options.py --part=show --out=FILE          # rows for docs/options.md

Speed: whole steps at ViT-B/16's proportions (196 patches, decoder two thirds as wide and deep as the encoder) and half
its width, batches in memory; all options take turns in one process, and a ratio is the median over rounds of faithful
over option. `--rounds=0` compiles alone, so that a cache of programs is warm before the machine is kept quiet.

Quality: pretraining on CIFAR-10, the same images, steps and seed for all, then kNN and linear probe on frozen features;
`faithful` is run with two seeds, to show the noise. Rows are appended as JSON lines when they are there, and what is
there is not measured again.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cifar10_study import CIFAR, Study

from maejax import build, runs
from maejax import config as configs
from maejax.evaluate import Evaluator
from maejax.mesh import make_mesh, to_global
from maejax.overrides import override
from maejax.program import make_program

THIRD = str(1 / 3)  # of the masked patches; at ratio 0.75 CrossMAE's quarter of all
HALF_B = {
    "image_size": "224", "model.patch": "16", "model.width": "384", "model.depth": "12", "model.heads": "6",
    "decoder.width": "256", "decoder.depth": "8", "decoder.heads": "8", "total_steps": "1000", "model.scan": "true",
    "sharding": "replicate",
}  # fmt: skip
STUDY: dict[str, object] = {
    "data.split": "train[:20000]", "data.eval_split": "test", "model.width": 96, "model.depth": 6, "model.heads": 3,
    "decoder.width": 64, "decoder.depth": 2, "decoder.heads": 4, "batch_size": 128, "base_lr": 2e-3, "epochs": 2,
    "warmup_epochs": 0.2, "log_steps": 50, "save_epochs": 1, "evals": "", "picture_epochs": 100,
}  # fmt: skip
OPTIONS: dict[str, dict[str, str]] = {
    "faithful": {},
    "subset-half": {"decoder.subset": "0.5"},
    "subset-third": {"decoder.subset": THIRD},
    "cross-all": {"decoder.kind": "cross"},
    "cross-third": {"decoder.kind": "cross", "decoder.subset": THIRD},
    "no-cls": {"model.cls_token": "false"},
}
SPEED = OPTIONS | {"cross-third-12": OPTIONS["cross-third"] | {"decoder.depth": "12"}}
SIDES = {"speed": (128, 160, 192, 224), "quality": (16, 24, 32)}
QUALITY: dict[str, dict[str, str]] = {
    "faithful": {}, "cross-third": OPTIONS["cross-third"], "subset-half": OPTIONS["subset-half"],
    "sides": {"data.sides": ",".join(map(str, SIDES["quality"]))}, "faithful-seed1": {"seed": "1"},
    "cross-all": OPTIONS["cross-all"], "no-cls": OPTIONS["no-cls"], "repeats-4": {"data.repeats": "4"},
    "subset-third": OPTIONS["subset-third"],
}  # fmt: skip


def known(out: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def append(out: Path, row: dict[str, Any]) -> None:
    """One more row."""
    with out.open("a") as file:
        file.write(json.dumps(row | {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}) + "\n")
    print(json.dumps(row), flush=True)


# ---- Speed ----------------------------------------------------------------------------------------------------------


class Step:
    """A compiled step and all that it needs."""

    def __init__(self, keys: dict[str, str], batch: int):
        c = override(configs.load("pretrain_vit_b16_imagenet"), HALF_B | {"batch_size": str(batch)} | keys)
        mesh = make_mesh(c.mesh)
        program = make_program(c, mesh, num_examples=10_000, num_classes=None)
        rng = np.random.default_rng(0)
        rows = {"image": rng.integers(0, 256, program.batch["image"].shape, dtype=np.uint8)}
        order = np.stack([rng.permutation(build.shapes_of(c).patches) for _ in range(batch)]).astype(np.int32)
        visible, masked = (program.batch[name].shape[1] for name in ("visible", "masked"))
        rows |= {"visible": order[:, :visible], "masked": order[:, visible : visible + masked]}
        self.flops = build.flops_per_image(c)
        self._batch, self._state, self._step = to_global(rows, mesh), program.new_state(), program.train_step
        self.seconds()

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def speed(out: Path, *, rounds: int, batch: int) -> None:
    """One row an option: faithful over option, of step times and of analytic FLOPs."""
    todo = SPEED | {f"side-{side}": {"image_size": str(side)} for side in SIDES["speed"][:-1]}
    steps = {}
    for name, keys in todo.items():
        start = time.perf_counter()
        steps[name] = Step(keys, batch)
        print(f"{name} compiled and run in {time.perf_counter() - start:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step.seconds())
    if not rounds:
        return
    faithful = times["faithful"]
    parts = [f"side-{side}" for side in SIDES["speed"][:-1]] + ["faithful"]
    times["sides"] = [statistics.mean(row) for row in zip(*(times[name] for name in parts), strict=True)]
    flops = {name: step.flops for name, step in steps.items()}
    flops["sides"] = statistics.mean(flops[name] for name in parts)
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(faithful, measured, strict=True)]
        append(out, {
            "part": "speed", "option": name, "step_ratio": statistics.median(ratios), "least": min(ratios),
            "most": max(ratios), "flop_ratio": flops["faithful"] / flops[name], "rounds": rounds, "batch": batch,
            "step_seconds": statistics.median(measured),
        })  # fmt: skip


# ---- Quality --------------------------------------------------------------------------------------------------------


def quality(out: Path, data_dir: Path, workdir: Path, only: list[str], images: int) -> None:
    """One row an option: accuracies on frozen features of the same number of images."""
    study = Study(workdir, data_dir, dry=False)
    done = {row["option"] for row in known(out) if row["part"] == "quality"}
    for name in only or QUALITY:
        if name in done:
            continue
        run = study.run(name, "pretrain", f"--config={CIFAR}", config=STUDY | QUALITY[name])
        c = runs.config_of_run(run)
        start = time.process_time()
        step, results = runs.evaluate(run, Evaluator(c, ("knn", "linear"), limit=images))
        accuracy = {metric: value for found in results.values() for metric, value in found.items()}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        cost = json.loads((run / "cost.json").read_text())
        append(out, {
            "part": "quality", "option": name, **accuracy, "steps": step, "seed": c.seed,
            "last_loss": [line["train/loss"] for line in lines if "train/loss" in line][-1],
            "pretrain_cpu_minutes": cost["cpu_minutes"], "evaluate_cpu_minutes": (time.process_time() - start) / 60,
            "flops_per_image": build.mean_flops_per_image(c), "eval_images": images,
        })  # fmt: skip


# ---- Rows -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For docs/options.md."""
    yield "| option | step time, faithful over this | FLOPs, the same | linear probe | kNN |"
    yield "|---|---|---|---|---|"
    by = {part: {row["option"]: row for row in rows if row["part"] == part} for part in ("speed", "quality")}
    for name in [*by["speed"], *(name for name in by["quality"] if name not in by["speed"])]:
        fast, good = by["speed"].get(name), by["quality"].get(name)
        cells = ["", ""]
        if fast:
            cells = [
                f"{fast['step_ratio']:.2f} ({fast['least']:.2f} to {fast['most']:.2f})",
                f"{fast['flop_ratio']:.2f}",
            ]
        cells += [f"{100 * good[metric]:.2f} %" if good else "" for metric in ("linear_top1", "knn_top1")]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "quality", "show"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cache", type=Path, help="of compiled programs")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--workdir", type=Path, default=Path("runs/options"))
    parser.add_argument("--only", default="", help="names of options, with commas between")
    parser.add_argument("--eval-images", type=int, default=5_000, help="of each split")
    options = parser.parse_args()
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
    if options.part == "speed":
        speed(options.out, rounds=options.rounds, batch=options.batch)
    elif options.part == "quality":
        only = [name for name in options.only.split(",") if name]
        quality(options.out, options.data_dir.absolute(), options.workdir.absolute(), only, options.eval_images)
    else:
        print("\n".join(table(known(options.out))))


if __name__ == "__main__":
    main()
