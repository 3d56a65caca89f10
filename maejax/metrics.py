"""Where numbers go: the terminal, train.log, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from maejax.errors import MaejaxError, UsageError
from maejax.redact import masked


class Console:
    """What a person reads: lines on the terminal, kept in train.log too.

    On a terminal the newest progress line stays in place at the bottom; elsewhere each is a line of its own.
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False):
        self._log: TextIO | None = log.open("a", buffering=1) if log else None
        self._quiet = quiet
        self._live: Live | None = None
        self._rich = RichConsole(highlight=False)

    def say(self, text: str) -> None:
        """One line (or several) that stays."""
        text = masked(text)
        if self._log:
            stamp = _now()
            self._log.writelines(f"{stamp} {line}\n" for line in text.splitlines())
        if self._quiet:
            return
        if self._live:
            self._rich.print(Text(text), soft_wrap=True)
        else:
            print(text, flush=True)

    def keep(self, text: str) -> None:
        """A line for train.log alone."""
        if self._log and not self._log.closed:
            self._log.write(f"{_now()} {text}\n")

    def progress(self, text: str) -> None:
        """A line that the next one replaces, on a terminal."""
        if self._quiet or not sys.stdout.isatty():
            self.say(text)
            return
        if self._log:
            self._log.write(f"{_now()} {text}\n")
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(Text(text, overflow="fold"), refresh=True)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Closes; why a run ended early is in its log, too, and not on the terminal alone."""
        if self._log and error is not None:
            self._log.write(f"{_now()} ended     {_one_line(error)}\n")
        self.close()

    def close(self) -> None:
        """Leaves the last progress line standing."""
        if self._live:
            self._live.stop()
            self._live = None
        if self._log:
            self._log.close()
            self._log = None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _one_line(error: BaseException) -> str:
    text = masked(" ".join(str(error).split()))
    return text if isinstance(error, MaejaxError) else f"{type(error).__name__} {text[:300]}".strip()


class Writer(Protocol):
    """A sink of metrics."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, of one step."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 (h w 3)."""

    def close(self) -> None:
        """Everything written."""


class JsonLines:
    """One JSON object a step, appended to a file; always on."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, "time": seconds, name: value, ...}."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | values) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pictures have files of their own."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard; `first_step` is where a resumed run goes on, so that no step appears twice."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None, flush_secs=30)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One curve a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A slider of pictures a name."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run of the workdir's name; a resumed run continues it."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        import wandb

        self._wandb = wandb
        file = workdir / "wandb_id.txt"
        if not file.exists():
            file.write_text(wandb.util.generate_id())
        wandb.init(id=file.read_text(), resume="allow", name=workdir.name, dir=str(workdir), config=config)

    @staticmethod
    def check() -> None:
        """Raises UsageError where wandb is not installed."""
        import importlib.util

        if importlib.util.find_spec("wandb") is None:
            raise UsageError("wandb=True needs the wandb package: pip install 'maejax[wandb]', or set wandb=False")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs them all at `step`."""
        self._wandb.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs a picture."""
        self._wandb.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends the W&B run."""
        self._wandb.finish()


def open_writers(
    workdir: Path, first_step: int, config: dict[str, Any], *, tensorboard: bool, wandb: bool
) -> list[Writer]:
    """The sinks of a run's metrics: metrics.jsonl always, the others as asked."""
    writers: list[Writer] = [JsonLines(workdir / "metrics.jsonl")]
    if tensorboard:
        writers.append(TensorBoard(workdir / "tensorboard", first_step))
    if wandb:
        writers.append(WeightsAndBiases(workdir, config))
    return writers


def cut_json_lines(path: Path, last: int, key: str = "step") -> None:
    """Drops the lines of steps after `last`, which a resumed run computes again, and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)[key] <= last:
                kept.append(line)
        except ValueError:
            continue
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept))
    draft.rename(path)


def duration(seconds: float) -> str:
    """41 s, 3m20s, 5h12m, 2d03h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02}m"
    return f"{s // 86400}d{s % 86400 // 3600:02}h"


def shown(metric: str, value: float) -> str:
    """A number of an evaluation for people: accuracies in per cent."""
    return f"{100 * value:.2f} %" if metric.endswith(("top1", "top5")) else f"{value:.4g}"
