"""CIFAR-10: what masked pretraining is worth, in two parts, as commands that anybody can repeat.

    python benchmarks/cifar10_study.py --data-dir=DIR --part=tutorial          the Keras tutorial's size and split
    python benchmarks/cifar10_study.py --data-dir=DIR --part=vit               a ViT with patch 4, pretrained and not
    python benchmarks/cifar10_study.py --data-dir=DIR --part=vit --budget=gpu  the same, longer and larger, for one GPU

DIR holds TFDS's cifar10, prepared as ArrayRecord. Every step is a `maejax` command, printed before it runs; a killed
study goes on where it stopped. At the end, and with --show at any time, it prints rows for docs/results.md.
"""

import argparse
import dataclasses
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

CIFAR = "pretrain_vit_ti4_cifar10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What differs between machines. Epochs of the vit part's pretraining are over all 50,000 training images."""

    tutorial_epochs: float
    width: int
    depth: int
    heads: int
    decoder: tuple[int, int, int]  # width, depth, heads
    pretrain_epochs: float
    batch: int
    labelled: int  # of the training images, for fine-tuning and from scratch
    finetune_epochs: float
    dtype: str = "float32"


BUDGETS = {
    "cpu": Budget(
        tutorial_epochs=30, width=96, depth=6, heads=3, decoder=(64, 1, 4), pretrain_epochs=8, batch=128,
        labelled=10_000, finetune_epochs=6,
    ),
    "gpu": Budget(
        tutorial_epochs=100, width=192, depth=12, heads=3, decoder=(192, 4, 3), pretrain_epochs=400, batch=512,
        labelled=50_000, finetune_epochs=50, dtype="bfloat16",
    ),
}  # fmt: skip


class Study:
    """Runs commands, adds up what they cost, and reads what they found."""

    def __init__(self, folder: Path, data_dir: Path, *, dry: bool):
        self.folder, self._data_dir, self._dry = folder, data_dir, dry

    def run(self, name: str, verb: str, *arguments: str, config: dict[str, object]) -> Path:
        """`maejax VERB ... --workdir=FOLDER/name`, unless it is done; resumes if it was begun."""
        workdir = self.folder / name
        done = workdir / "done"
        if self._dry or done.exists():
            return workdir
        flags = [f"--config.{key}={value}" for key, value in ({"data.dir": self._data_dir} | config).items()]
        self._call([verb, *arguments, f"--workdir={workdir}", *flags], cost=workdir / "cost.json")
        done.touch()
        return workdir

    def evaluate(self, workdir: Path, what: str) -> None:
        """`maejax evaluate` on all images, once."""
        if not self._dry and not (workdir / f"evaluated-{what}").exists():
            self._call(["evaluate", str(workdir), f"--with={what}"])
            (workdir / f"evaluated-{what}").touch()

    def _call(self, arguments: list[str], cost: Path | None = None) -> None:
        print("$ maejax " + shlex.join(arguments), flush=True)
        start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run([sys.executable, "-m", "maejax", *arguments])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        if cost is not None and cost.parent.exists():  # added up over interruptions
            spent = json.loads(cost.read_text()) if cost.exists() else {"wall_minutes": 0.0, "cpu_minutes": 0.0}
            spent["wall_minutes"] += (time.time() - start) / 60
            spent["cpu_minutes"] += cpu / 60
            cost.write_text(json.dumps(spent | {"date": time.strftime("%Y-%m-%d")}))
        if process.returncode:
            raise SystemExit(process.returncode)


def metric(workdir: Path, name: str, step: int | None = None) -> tuple[float, dict]:
    """The newest value of a metric (or of a step) and the record that it stands in."""
    found = []
    for file in (workdir / "evals").glob("*.json"):
        record = json.loads(file.read_text())
        if name in record["metrics"] and step in (None, record["step"]):
            found.append((record["step"], record["metrics"][name], record))
    if not found:
        raise SystemExit(f"{workdir} has no {name} yet")
    return max(found, key=lambda entry: entry[0])[1:]


def row(what: str, workdir: Path, *metrics: str) -> str:
    """A line of the table, with what it was measured on."""
    cells, record = [], {}
    for name in metrics:
        value, record = metric(workdir, name)
        cells.append(f"{name} {100 * value:.2f} %")
        if name.startswith(("knn", "linear")):
            cells[-1] += f" (untrained {100 * metric(workdir, name, 0)[0]:.2f} %)"
    cost = json.loads((workdir / "cost.json").read_text())
    return (
        f"| {what} | {', '.join(cells)} | {record['step']:,} x {record['config']['batch_size']} | "
        f"{cost['wall_minutes']:.0f} min, {cost['cpu_minutes']:.0f} CPU-min | {cost['date']}, seed {record['seed']}, "
        f"{(record['commit'] or '?')[:12]} |"
    )


def tutorial(study: Study, b: Budget, name: str) -> list[str]:
    """48 px, patch 6, encoder 128 x 3, decoder 64 x 1, mask 0.75, split 40k / 10k / 10k."""
    run = study.run(
        f"tutorial-{name}", "pretrain", f"--config={CIFAR}",
        config={
            "data.split": "train[:40000]", "data.eval_split": "test", "image_size": 48, "model.patch": 6,
            "model.width": 128, "model.depth": 3, "model.heads": 4, "decoder.width": 64, "decoder.depth": 1,
            "decoder.heads": 4, "batch_size": 128, "base_lr": 2e-3, "epochs": b.tutorial_epochs, "warmup_epochs": 2,
            "log_steps": 200, "save_epochs": 2, "picture_epochs": 10, "eval_epochs": 5, "eval_images": 100_000,
            "evals": "knn,linear", "dtype": b.dtype,
        },
    )  # fmt: skip
    return [row(f"tutorial's size, {b.tutorial_epochs:g} epochs", run, "linear_top1", "knn_top1")]


def vit(study: Study, b: Budget, name: str) -> list[str]:
    """Patch 4 at 32 px: pretrained, then judged by kNN, linear, partial and full fine-tuning, beside from scratch."""
    shape = {"model.width": b.width, "model.depth": b.depth, "model.heads": b.heads, "dtype": b.dtype}
    width, depth, heads = b.decoder
    pretrained = study.run(
        f"vit-{name}", "pretrain", f"--config={CIFAR}",
        config=shape | {
            "decoder.width": width, "decoder.depth": depth, "decoder.heads": heads, "batch_size": b.batch,
            "base_lr": 2e-3 if name == "cpu" else 5e-4, "epochs": b.pretrain_epochs,
            "warmup_epochs": b.pretrain_epochs / 20, "log_steps": 100, "save_epochs": 1, "evals": "knn,linear",
            "eval_images": 100_000,
        },
    )  # fmt: skip
    recipe = {
        "data.split": f"train[:{b.labelled}]", "epochs": b.finetune_epochs, "warmup_epochs": b.finetune_epochs / 10,
        "batch_size": 64 if name == "cpu" else 512, "log_steps": 50, "save_epochs": 1, "dtype": b.dtype,
    }  # fmt: skip
    start = f"--from={pretrained}"
    full = study.run(f"vit-{name}-full", "finetune", f"--config={FINETUNE}", start, config=recipe)
    four = study.run(
        f"vit-{name}-4blocks", "finetune", f"--config={FINETUNE}", start, config=recipe | {"finetune.blocks": 4}
    )
    scratch = study.run(
        f"vit-{name}-scratch", "finetune", f"--config={FINETUNE}",
        config=recipe | shape | {"optimizer.layer_decay": 1.0},
    )  # fmt: skip
    what = f"ViT {b.width} x {b.depth}, patch 4"
    labels = f"{b.labelled:,} labelled images, {b.finetune_epochs:g} epochs"
    return [
        row(f"{what}, pretrained {b.pretrain_epochs:g} epochs", pretrained, "linear_top1", "knn_top1"),
        row(f"{what}, from these weights, {labels}", full, "top1"),
        row(f"{what}, the last 4 blocks of these, {labels}", four, "top1"),
        row(f"{what}, from scratch, {labels}", scratch, "top1"),
    ]


FINETUNE = "finetune_vit_ti4_cifar10"
PARTS = {"tutorial": tutorial, "vit": vit}


def main() -> None:
    """Runs what is missing, then prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--workdir", type=Path, default=Path("runs/cifar10_study"))
    parser.add_argument("--show", action="store_true", help="print the rows of what is done and run nothing")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    study = Study(options.workdir.absolute(), options.data_dir.absolute(), dry=options.show)
    print("\n".join(PARTS[options.part](study, BUDGETS[options.budget], options.budget)))


if __name__ == "__main__":
    main()
