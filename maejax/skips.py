"""Skipped steps, as the host sees them: listed with the records of their batches, and several in a row undone."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from maejax.interruption import StepEnd
from maejax.rollback import Record, RollBack, offset


class WatchSkips:
    """Lists skipped steps in skipped.jsonl, this process's records of each; raises RollBack when `limit` are in a row.

    The verdict on a step is read when the next one has been started, so no step waits for it; all processes read the
    same one at the same step.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, rollbacks: list[Record], limit: int):
        self._path, self._say, self._rollbacks, self._limit = path, say, rollbacks, limit
        self._last: tuple[int, dict[str, jax.Array], np.ndarray | Sequence[int]] | None = None

    def __call__(self, end: StepEnd) -> None:
        self.settle()
        self._last = end.step, end.metrics, end.records
        end.metrics["guard/in_a_row"].copy_to_host_async()

    def settle(self) -> None:
        """Waits for the verdict on the last step."""
        if self._last is None:
            return
        (step, metrics, records), self._last = self._last, None
        in_a_row = int(metrics["guard/in_a_row"])
        if not in_a_row:
            return
        loss, norm = float(metrics["train/loss"]), float(metrics["train/grad_norm"])
        finite = math.isfinite(loss) and math.isfinite(norm)
        reason = "the gradient's norm is " + f"{norm:.4g}" if math.isfinite(loss) else f"the loss is {loss}"
        line = {
            "step": step, "batch": step + offset(self._rollbacks, step), "reason": "spike" if finite else "not finite",
            "loss": str(loss), "grad_norm": str(norm), "records": np.asarray(records).tolist(),
        }  # fmt: skip
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._say(f"step {step}: skipped, {reason}; {self._path.name} lists its records")
        if in_a_row >= self._limit:
            raise RollBack(step, reason)
