"""What weights are worth: evaluations on frozen features, recorded with what they were measured on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maejax import build
from maejax.config import to_dict
from maejax.errors import UsageError, look_up
from maejax.evals import EVALS
from maejax.evals.features import extract
from maejax.models.vit import pool
from maejax.tree import PyTree
from maejax.workdir import git_commit


class Evaluator:
    """Measures what weights are worth, on frozen features of the run's two splits.

    Raises:
      UsageError: an evaluation is unknown, or there are no labels or no two splits for it; no device is touched.
    """

    def __init__(self, c: ConfigDict, names: Sequence[str], *, limit: int | None = None):
        self.names = tuple(names)
        self._c = c
        for name in self.names:
            look_up(EVALS, name, "evals")
        self.train, self.test = build.source_of(c), build.source_of(c, evaluation=True)
        if not (self.train.num_classes and self.test.num_classes):
            raise UsageError(f"evaluations need labels, and {c.data.source} has none; set --config.evals=none")
        if self.train.fingerprint() == self.test.fingerprint():
            raise UsageError(
                f"evaluations need two splits, and {c.data.split!r} and {c.data.eval_split!r} of {c.data.source} are "
                "the same images; set --config.data.eval_split or --config.evals=none"
            )
        if self.train.num_classes != self.test.num_classes:
            raise UsageError(
                f"{c.data.source} has {self.train.num_classes} classes in {c.data.split!r} and {self.test.num_classes} "
                f"in {c.data.eval_split!r}; evaluations need the same ones"
            )
        # Evenly spaced, so that a sorted source gives all classes.
        self._chosen = [
            np.unique(np.linspace(0, len(source) - 1, min(len(source), limit or len(source))).astype(np.int64))
            for source in (self.train, self.test)
        ]
        self._encode: Callable[..., jax.Array] | None = None

    def __call__(self, objective: nn.Module, weights: PyTree, mesh: Mesh) -> dict[str, float]:
        """One number for each evaluation, by the evaluation's name."""
        if self._encode is None:  # compiled once, for all steps

            def encode(weights: PyTree, images: jax.Array) -> jax.Array:
                tokens = objective.apply({"params": weights}, images, method="features")
                return pool(tokens, "mean", self._c.model.cls_token)

            self._encode = jax.jit(encode)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = -(-256 // shards) * shards
        splits = []
        for source, indices in zip((self.train, self.test), self._chosen, strict=True):
            batches = build.ordered_batches(self._c, source, batch_size=rows, indices=indices)
            splits.append(extract(self._encode, weights, batches, mesh))
        assert self.train.num_classes
        return {name: EVALS[name][1](splits[0], splits[1], self.train.num_classes) for name in self.names}

    def record(self, workdir: Path, step: int, values: dict[str, float]) -> None:
        """Writes evals/<name>_<step>.json, each with what it was measured on."""
        (workdir / "evals").mkdir(exist_ok=True)
        c = self._c
        for name, value in values.items():
            result = {
                "eval": name,
                "metric": EVALS[name][0],
                "value": value,
                "step": step,
                "data": c.data.source,
                "splits": [c.data.split, c.data.eval_split],
                "images": [len(chosen) for chosen in self._chosen],
                "data_ids": [self.train.fingerprint(), self.test.fingerprint()],
                "seed": c.seed,
                "commit": git_commit(),
                "config": to_dict(c),
            }
            (workdir / "evals" / f"{name}_{step}.json").write_text(json.dumps(result, indent=2) + "\n")

    def forget(self, workdir: Path, last_step: int) -> None:
        """Removes the records of steps after `last_step`, which a resumed run computes again."""
        for name in self.names:
            for file in (workdir / "evals").glob(f"{name}_*.json"):
                if int(file.stem.rpartition("_")[2]) > last_step:
                    file.unlink()

    def recorded(self, workdir: Path, step: int) -> dict[str, float] | None:
        """What `record` has written for a step; None unless it is there for all evaluations."""
        files = {name: workdir / "evals" / f"{name}_{step}.json" for name in self.names}
        if not all(file.exists() for file in files.values()):
            return None
        return {name: json.loads(file.read_text())["value"] for name, file in files.items()}


def shown(name: str, value: float) -> str:
    """A result for people: accuracies in per cent."""
    return f"{100 * value:.1f} %" if EVALS[name][0].endswith("top1") else f"{value:.1f}"
