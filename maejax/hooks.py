"""What happens after a step: listing bad images, logging, saving, drawing, profiling.

Hooks that keep something on disk are told by `first_step` where a resumed run goes on.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maejax import watchdog
from maejax.checkpoint import Checkpoints
from maejax.chips import PEAK_FLOPS
from maejax.errors import Diverged, TooManyBadImages
from maejax.faults import fault_point
from maejax.interruption import News, StepEnd
from maejax.metrics import Console, Writer, duration
from maejax.state import TrainState


class ListBadImages:
    """Lists this process's unreadable images in bad_images.jsonl, and stops the run when all have too many."""

    def __init__(self, path: Path, name_of: Callable[[int], str], news: News, *, batch_size: int, max_fraction: float):
        self._path = path
        self._name_of = name_of
        self._news = news
        self._batch_size = batch_size
        self._max_fraction = max_fraction

    def __call__(self, end: StepEnd) -> None:
        if end.faults:
            with self._path.open("a") as file:
                for record, cause in end.faults:
                    line = {"step": end.step, "record": record, "name": self._name_of(record), "cause": cause}
                    file.write(json.dumps(line) + "\n")
        # At least a thousand records are read before a fraction means anything.
        read = max(end.step * self._batch_size, 1000)
        counts = self._news.bad_images
        if (bad := counts.total()) > self._max_fraction * read:
            causes = ", ".join(f"{number} {cause}" for cause, number in counts.most_common())
            raise TooManyBadImages(
                f"{bad} of {end.step * self._batch_size} records could not be read ({causes}), more than "
                f"data.max_bad_fraction={self._max_fraction} allows; {self._path} lists them"
            )


class LogMetrics:
    """One line every so many steps, for people and for machines.

    The numbers of a step are written when they have been computed, never waited for; `flush` writes them at once.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        console: Console,
        *,
        every: int,
        total_steps: int,
        first_step: int,
        batch_size: int,
        num_examples: int,
        flops_per_image: float | None,
        news: News,
    ):
        self._writers, self._console = writers, console
        self._every, self._total, self._last = every, total_steps, first_step
        self._batch_size, self._num_examples = batch_size, num_examples
        self._news = news
        self._since = time.perf_counter()
        self._waited = 0.0
        self._starting = True
        self._pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
        device = jax.devices()[0]
        peak = next((flops for kind, flops in PEAK_FLOPS.items() if kind in device.device_kind), None)
        self._utilisation = flops_per_image / peak if flops_per_image and peak else None  # per img/s and device

    def __call__(self, end: StepEnd) -> None:
        if self._starting:  # compilation is not part of the speed
            jax.block_until_ready(end.metrics)
            self._starting = False
            self._console.say(f"first step after {duration(time.perf_counter() - self._since)}, compilation included")
            self._since, self._last = time.perf_counter(), end.step
        else:
            self._waited += end.data_wait
        # Several processes do everything at the same step, and a diverged run ends in `flush`.
        if self._pending and jax.process_count() == 1 and _ready(self._pending[1]):
            self.flush()
        if end.step % self._every and end.step != self._total:
            return
        self.flush()
        self._pending = (end.step, end.metrics, self._speed(end.step))

    def _speed(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        values: dict[str, float] = {}
        done = step - 1  # the loop has waited for the step before this one
        if (steps := done - self._last) > 0:
            per_step = (now - self._since) / steps
            per_device = self._batch_size / per_step / jax.device_count()
            values = {
                "perf/step_time": per_step,
                "perf/img_per_sec": self._batch_size / per_step,
                "perf/img_per_sec_per_device": per_device,
                "perf/data_wait": self._waited / (now - self._since),
            }
            if self._utilisation:
                values["perf/mfu"] = per_device * self._utilisation
            self._since, self._last, self._waited = now, done, 0.0
        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            values["perf/device_mem_gb"] = stats["peak_bytes_in_use"] / 1e9
        values["perf/host_mem_gb"] = host_memory() / 1e9
        return values

    def restart(self, step: int) -> None:
        """Measures speed from now on: what went before, after `step`, was not training."""
        self._since, self._last, self._waited = time.perf_counter(), step, 0.0

    def flush(self) -> None:
        """Writes the metrics that are still pending; waits for them if it must."""
        if not self._pending:
            return
        step, metrics, speed = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["progress/epoch"] = step * self._batch_size / self._num_examples
        values["progress/examples"] = step * self._batch_size
        values |= {f"data/bad_{cause}": number for cause, number in sorted(self._news.bad_images.items())}
        for writer in self._writers:
            writer.scalars(step, values | speed)
        self._console.progress(self._line(step, values, speed))
        raise_if_diverged(step, values)

    def _line(self, step: int, values: dict[str, float], speed: dict[str, float]) -> str:
        parts = [
            f"step {step}/{self._total} {100 * step / self._total:.0f}%",
            f"loss {values['train/loss']:.4f}",
            f"lr {values['train/lr']:.2e}",
            f"|g| {values['train/grad_norm']:.3g}",
        ]
        if "perf/step_time" in speed:
            rate, per_device = speed["perf/img_per_sec"], speed["perf/img_per_sec_per_device"]
            parts.append(f"img/s {rate:.4g}" + (f" ({per_device:.4g}/dev)" if jax.device_count() > 1 else ""))
            parts.append(f"data {100 * speed['perf/data_wait']:.0f}%")
        if "perf/mfu" in speed:
            parts.append(f"mfu {100 * speed['perf/mfu']:.0f}%")
        memory = speed.get("perf/device_mem_gb", speed["perf/host_mem_gb"])
        parts.append(f"mem {memory:.1f}G")
        if (bad := self._news.bad_images.total()) > 0:
            parts.append(f"bad {bad}")
        if "perf/step_time" in speed and step < self._total:
            parts.append(f"eta {duration((self._total - step) * speed['perf/step_time'])}")
        return "  ".join(parts)


def _ready(metrics: dict[str, Any]) -> bool:
    return all(value.is_ready() for value in metrics.values())


def raise_if_diverged(step: int, values: dict[str, float]) -> None:
    """Raises Diverged if the loss or the gradient of a step is not finite."""
    for name in ("train/loss", "train/grad_norm"):
        if not np.isfinite(values[name]):
            raise Diverged(
                f"{name} is {values[name]} at step {step}; the last checkpoint is intact: start from it with --from "
                "and a smaller base_lr, a longer warmup or optimizer.clip_norm=1"
            )


class SaveCheckpoint:
    """Saves every so many steps and after the last; what was logged before is on disk first."""

    def __init__(
        self, checkpoints: Checkpoints, log: LogMetrics, news: News, *, every: int, total_steps: int,
        meta: dict[str, Any],
    ):  # fmt: skip
        self._checkpoints, self._log, self._news = checkpoints, log, news
        self._every, self._total, self._meta = every, total_steps, meta

    def __call__(self, end: StepEnd) -> None:
        if end.step % self._every == 0 or end.step == self._total:
            self.save(end)

    def save(self, end: StepEnd) -> None:
        """Saves now; a state that has diverged is never saved."""
        self._news.settle()
        self._log.flush()
        raise_if_diverged(end.step, {name: float(value) for name, value in jax.device_get(end.metrics).items()})
        watchdog.phase("save")
        fault_point("save")
        watchdog.phase("save")  # in Orbax processes wait for each other: who comes late has not come to here
        self._checkpoints.save(end.state, self._meta | {"bad_images": dict(self._news.bad_images)})


class Periodically:
    """Calls `action(state, step)` every so many steps (0: never) and after the last, once the step itself is logged."""

    def __init__(self, action: Callable[[TrainState, int], Any], log: LogMetrics, *, every: int, total_steps: int):
        self._action, self._log, self._every, self._total = action, log, every, total_steps

    def __call__(self, end: StepEnd) -> None:
        if end.step == self._total or (self._every and end.step % self._every == 0):
            self._log.flush()
            watchdog.phase("evaluate")
            self._action(end.state, end.step)
            self._log.restart(end.step)


class Profile:
    """Traces the steps FIRST:LAST (None: none) with JAX's profiler, on every process."""

    def __init__(self, folder: Path, steps: str | None, *, first_step: int):
        self._folder, self._tracing = folder, False
        self._first, self._last = map(int, steps.split(":")) if steps else (0, 0)
        self._start_before(first_step + 1)

    def __call__(self, end: StepEnd) -> None:
        if end.step == self._last:
            jax.block_until_ready(end.metrics)
            self.close()
        self._start_before(end.step + 1)

    def _start_before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def host_memory() -> float:
    """Bytes of memory that this process has in use (its peak, where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
