"""What happens after a step: listing bad images, logging, saving, drawing, profiling.

Hooks that keep something on disk are told by `first_step` where a resumed run goes on.
"""

import json
import math
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from maejax import watchdog
from maejax.checkpoint import Checkpoints
from maejax.chips import PEAK_FLOPS
from maejax.errors import TooManyBadImages
from maejax.faults import fault_point
from maejax.interruption import News, StepEnd
from maejax.metrics import Console, Writer, duration
from maejax.redact import masked
from maejax.state import TrainState

FEW = 50  # bad images, that never stop a run which may have any


class ListBadImages:
    """Lists this process's unreadable images in bad_images.jsonl, and stops the run when all have too many.

    Too many: more than a fraction of all records that were read, or of the last ones, of which a hundred may be bad. A
    disk that fails after a million good records is noticed with the next thousands.
    """

    def __init__(self, path: Path, name_of: Callable[[int], str], news: News, *, batch_size: int, max_fraction: float):
        self._path = path
        self._name_of = name_of
        self._news = news
        self._batch_size = batch_size
        self._max_fraction = max_fraction
        window = max(10_000, 100 / max(max_fraction, 1e-4))  # records
        # How many were bad before each of the last steps.
        self._totals = deque([news.bad_images.total()], maxlen=1 + math.ceil(window / batch_size))

    def __call__(self, end: StepEnd) -> None:
        if end.faults:
            with self._path.open("a") as file:
                for record, cause in end.faults:
                    name = masked(self._name_of(record))
                    file.write(json.dumps({"step": end.step, "record": record, "name": name, "cause": cause}) + "\n")
        counts = self._news.bad_images
        self._totals.append(total := counts.total())
        self._check(total, end.step * self._batch_size, counts)
        self._check(total - self._totals[0], (len(self._totals) - 1) * self._batch_size, counts, "the last ")

    def _check(self, bad: int, read: int, counts: "Counter[str]", which: str = "") -> None:
        # A fraction of few means nothing: of a thousand records, chance makes one in a thousand bad twice as many.
        if bad > max(self._max_fraction * read, FEW if self._max_fraction else 0):
            causes = ", ".join(f"{number} {cause}" for cause, number in counts.most_common())
            raise TooManyBadImages(
                f"{bad} of {which}{read} records could not be read ({causes}), more than "
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
        flops_per_image: Callable[[int], float] | None,
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
        self._bad: Counter[str] | None = None  # images until the pending step, once that is known of all processes
        device = jax.devices()[0]
        peak = next((flops for kind, flops in PEAK_FLOPS.items() if kind in device.device_kind), None)
        self._flops_per_image, self._peak = flops_per_image, peak

    def __call__(self, end: StepEnd) -> None:
        if self._starting:  # compilation is not part of the speed
            jax.block_until_ready(end.metrics)
            self._starting = False
            self._console.say(f"first step after {duration(time.perf_counter() - self._since)}, compilation included")
            self._since, self._last = time.perf_counter(), end.step
        else:
            self._waited += end.data_wait
        if self._pending and self._bad is None:
            self._bad = Counter(self._news.bad_images)
        # Several processes do everything at the same step, and a diverged run ends in `flush`.
        if self._pending and jax.process_count() == 1 and _ready(self._pending[1]):
            self.flush()
        if end.step % self._every and end.step != self._total:
            return
        self.flush()
        self._pending = (end.step, end.metrics, self._speed(end.step))
        self._bad = Counter(self._news.bad_images) if jax.process_count() == 1 else None

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
            if self._flops_per_image and self._peak:
                values["perf/mfu"] = per_device * self._flops_per_image(step) / self._peak
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
        if self._bad is None:
            self._news.settle()
        bad = self._news.bad_images if self._bad is None else self._bad
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["progress/epoch"] = step * self._batch_size / self._num_examples
        values["progress/examples"] = step * self._batch_size
        values |= {f"data/bad_{cause}": number for cause, number in sorted(bad.items())}
        for writer in self._writers:
            writer.scalars(step, values | speed)
        self._console.progress(self._line(step, values, speed))

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
        if values.get("guard/skipped", 0) > 0:
            parts.append(f"skipped {values['guard/skipped']:.0f}")
        if "perf/step_time" in speed and step < self._total:
            parts.append(f"eta {duration((self._total - step) * speed['perf/step_time'])}")
        return "  ".join(parts)


def _ready(metrics: dict[str, Any]) -> bool:
    return all(value.is_ready() for value in metrics.values())


class SaveCheckpoint:
    """Saves every so many steps and after the last; what was logged before is on disk first."""

    def __init__(
        self, checkpoints: Checkpoints, log: LogMetrics, news: News, *, every: int, total_steps: int,
        meta: dict[str, Any], check: Callable[[StepEnd], None],
    ):  # fmt: skip
        self._checkpoints, self._log, self._news, self._check = checkpoints, log, news, check
        self._every, self._total, self._meta = every, total_steps, meta

    def __call__(self, end: StepEnd) -> None:
        if self._news.save_failed:
            self._checkpoints.wait()  # which tells, and stops the run at the second time
        if end.step % self._every == 0 or end.step == self._total:
            self.save(end, wait=end.step == self._total)

    def save(self, end: StepEnd, *, wait: bool) -> None:
        """Saves now, if `check` raises no error; with `wait` even if the last save takes long."""
        self._news.settle()
        self._check(end)
        self._log.flush()
        fault_point("save")
        watchdog.phase("save")  # in Orbax processes wait for each other: who comes late has not come to here
        news = {"bad_images": dict(self._news.bad_images), "ledger": self._news.ledger.chain}
        self._checkpoints.save(end.state, self._meta | news, wait=wait)


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
