"""What weights are worth: evaluations on whole splits, recorded with what they were measured on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maejax import build
from maejax.config import to_dict
from maejax.data.sources import Source
from maejax.errors import UsageError, look_up
from maejax.evals import EVALS, Split
from maejax.evals.features import extract
from maejax.mesh import batch_shards, process_share
from maejax.models.vit import pool
from maejax.tree import PyTree
from maejax.workdir import git_commit

Results = dict[str, dict[str, float]]  # numbers by evaluation and metric


class Evaluator:
    """Measures what weights are worth on the run's two splits.

    Raises:
      UsageError: an evaluation is unknown, or there are no labels or no two splits for it; no device is touched.
    """

    def __init__(self, c: ConfigDict, names: Sequence[str], *, limit: int | None = None):
        self.names = tuple(names)
        self._c = c
        evals = [look_up(EVALS, name, "evals") for name in self.names]
        self.test = build.source_of(c, evaluation=True)
        self.train: Source | None = build.source_of(c) if any(e.trains for e in evals) else None
        self._check()
        # Evenly spaced, so that a sorted source gives all classes.
        self._chosen = {
            split: np.unique(np.linspace(0, len(source) - 1, min(len(source), limit or len(source))).astype(np.int64))
            for split, source in (("train", self.train), ("test", self.test))
            if source is not None
        }
        self._compiled: dict[str, Callable[..., jax.Array]] = {}

    def _check(self) -> None:
        c, train, test = self._c, self.train, self.test
        if not test.num_classes or (train and not train.num_classes):
            raise UsageError(f"evaluations need labels, and {c.data.source} has none; set --config.evals=none")
        if len(test) == 0:
            raise UsageError(f"data.eval_split={c.data.eval_split!r} of {c.data.source} is empty; name another one")
        if build.classifies(c) and "accuracy" in self.names and test.num_classes != c.finetune.num_classes:
            raise UsageError(
                f"{c.data.source} has {test.num_classes} classes, the classifier {c.finetune.num_classes}; use knn or "
                "linear, or fine-tune on these images"
            )
        if train is None:
            return
        if train.fingerprint() == test.fingerprint():
            raise UsageError(
                f"evaluations need two splits, and {c.data.split!r} and {c.data.eval_split!r} of {c.data.source} are "
                "the same images; set --config.data.eval_split or --config.evals=none"
            )
        if train.num_classes != test.num_classes:
            raise UsageError(
                f"{c.data.source} has {train.num_classes} classes in {c.data.split!r} and {test.num_classes} in "
                f"{c.data.eval_split!r}; evaluations need the same ones"
            )

    def __call__(
        self, objective: nn.Module, variables: PyTree, mesh: Mesh, *, before_batch: Callable[[], None] = lambda: None
    ) -> Results:
        """The numbers of every evaluation; `variables` are {"params": ...} and what else the objective keeps.

        `before_batch` is called before every batch of images, and may raise.
        """
        made: dict[tuple[str, str], Split] = {}

        def split(name: str, method: str) -> Split:
            if (name, method) not in made:
                made[name, method] = self._outputs(objective, variables, mesh, name, method, before_batch)
            return made[name, method]

        results = {}
        for name in self.names:
            e = EVALS[name]
            train = split("train", e.method) if e.trains else (np.zeros((0, 0)), np.zeros(0))
            results[name] = e.function(train, split("test", e.method), self.test.num_classes or 0)
        return results

    def _outputs(
        self, objective: nn.Module, variables: PyTree, mesh: Mesh, split: str, method: str,
        before_batch: Callable[[], None],
    ) -> Split:  # fmt: skip
        """What the objective's method makes of a split's images, and their labels."""
        if method not in self._compiled:  # once for all steps

            def encode(variables: PyTree, images: jax.Array) -> jax.Array:
                output = objective.apply(variables, images, method=method)
                if output.ndim == 2:  # logits
                    return output
                cls_token = self._c.model.cls_token
                return pool(output, "cls+mean" if cls_token else "mean", cls_token)

            self._compiled[method] = jax.jit(encode)
        shards = batch_shards(mesh)
        source = self.train if split == "train" else self.test
        assert source is not None
        part, parts = process_share(mesh, jax.process_index())
        batches = build.ordered_batches(
            self._c, source, batch_size=-(-256 // shards) * shards, indices=self._chosen[split], process_index=part,
            process_count=parts,
        )  # fmt: skip
        return extract(self._compiled[method], variables, batches, mesh, before_batch)

    def record(self, workdir: Path, step: int, results: Results, folder: str = "evals") -> None:
        """Writes <folder>/<name>_<step>.json, each with what it was measured on."""
        (workdir / folder).mkdir(exist_ok=True, parents=True)
        c = self._c
        for name, metrics in results.items():
            result: dict[str, Any] = {
                "eval": name,
                "metrics": metrics,
                "step": step,
                "data": c.data.source,
                "splits": {"train": c.data.split, "test": c.data.eval_split},
                "images": {split: len(chosen) for split, chosen in self._chosen.items()},
                "data_ids": {
                    split: source.fingerprint()
                    for split, source in (("train", self.train), ("test", self.test))
                    if source is not None
                },
                "seed": c.seed,
                "commit": git_commit(),
                "config": to_dict(c),
            }
            (workdir / folder / f"{name}_{step}.json").write_text(json.dumps(result, indent=2) + "\n")

    def forget(self, workdir: Path, last_step: int) -> None:
        """Removes the records of steps after `last_step`, which a resumed run computes again."""
        for name in self.names:
            for file in (workdir / "evals").glob(f"{name}_*.json"):
                if int(file.stem.rpartition("_")[2]) > last_step:
                    file.unlink()

    def recorded(self, workdir: Path, step: int) -> Results | None:
        """What `record` has written for a step; None unless it is there for all evaluations."""
        files = {name: workdir / "evals" / f"{name}_{step}.json" for name in self.names}
        if not all(file.exists() for file in files.values()):
            return None
        return {name: json.loads(file.read_text())["metrics"] for name, file in files.items()}


def by_metric(results: Results) -> dict[str, float]:
    """All numbers by their metrics' names alone."""
    return {metric: value for metrics in results.values() for metric, value in metrics.items()}
