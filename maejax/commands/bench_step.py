"""Say how fast this machine trains a config: the compiled step alone, the whole loop, and the start.

examples:
  maejax bench step
  maejax bench step ~/photos --config=pretrain_vit_b16_imagenet --config.batch_size=16 --steps=5
  maejax bench step --config=pretrain_vit_l16_imagenet --config.batch_size=256 --json

Bare step, loop and a large matrix product take turns, --windows times; medians are printed. The loop is a run's own,
with its logs, guards and augmentation, but no checkpoints, pictures or evaluations; without SOURCE its images are
random ones in memory. Images that grow have their last size. The start is measured in two processes of their own.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from maejax import config as configs
from maejax.commands.arguments import Parser, prepare_libraries, refuse_bare_assignment, split_config_flags
from maejax.errors import MaejaxError, UsageError
from maejax.metrics import duration
from maejax.overrides import override

if TYPE_CHECKING:
    from maejax.prepare import Plan
    from maejax.program import Program

AHEAD = 3  # steps before a window that are not timed: batches that were made during the last one are used up
PRODUCT = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # side of the matrices


def run(arguments: Sequence[str]) -> None:
    """maejax bench step."""
    options, config = parse(arguments)
    planned = plan(config, options.source)
    start = {} if options.first_step else start_seconds(arguments)  # before this process takes the devices
    prepare_libraries()
    with contextlib.closing(Bench(planned)) as bench:
        if options.first_step:
            return bench.loop(1)
        result = bench.measure(options.windows, options.steps) | start
    if options.json:
        print(json.dumps(result | {"config": configs.to_dict(config)}))
        return
    for line in lines(result):
        print(line)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The options, and a config of a run that never ends and stores nothing."""
    file, assignments, others = split_config_flags(arguments)
    parser = Parser("bench step", __doc__)
    parser.add_argument("source", nargs="?", help="images (default: random ones in memory)")
    parser.add_argument("--config", metavar="FILE", help="a recipe (default: pretrain_digits)")
    parser.add_argument("--windows", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="that a window has (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)  # the processes that only start
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([options.source] if options.source else [])]:
        refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see maejax bench step --help")
    if options.windows < 1 or options.steps < 1:
        raise UsageError(f"--windows={options.windows} and --steps={options.steps} must be at least 1")
    if options.source:
        assignments.setdefault("data.source", options.source)
    config = override(configs.load(file or "pretrain_digits"), assignments)
    never = {f"{name}_steps": "1000000000" for name in ("total", "save", "picture")}
    return options, override(config, never | {"eval_steps": "0", "evals": "", "wandb": "false", "data.sides": "()"})


def plan(config: ConfigDict, source: str | None) -> "Plan":
    """The run whose loop is measured. Raises UsageError as for any run."""
    from maejax import build
    from maejax.check import check
    from maejax.prepare import Plan

    check(config)
    build.check_names(config)
    if source is not None:
        images: Any = build.source_of(config)
    else:
        s = build.shapes_of(config)
        images = RandomImages(s.image, s.channels, config.finetune.num_classes if build.classifies(config) else None)
    if build.classifies(config):
        config = build.with_classes(config, images)
    return Plan(config=config, workdir=Path(tempfile.mkdtemp(prefix="maejax-bench-")), source=images)


class RandomImages:
    """As many uint8 images (h w c) as an epoch may want: sixteen random ones, again and again."""

    def __init__(self, size: tuple[int, int], channels: int, num_classes: int | None):
        self.num_classes = num_classes
        self._images = np.random.default_rng(0).integers(0, 256, (16, *size, channels), np.uint8)

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index % 16], "label": 0}

    def name(self, index: int) -> str:
        """Its number."""
        return str(index)

    def fingerprint(self) -> str:
        """The same for all."""
        return "0" * 16


class Bench:
    """A run that goes on as long as it is asked to, in a folder of its own that `close` deletes."""

    def __init__(self, p: "Plan"):
        from maejax import train
        from maejax.mesh import make_mesh
        from maejax.program import make_program

        self._plan, self._cleanup, self._done = p, contextlib.ExitStack(), 0
        self._cleanup.callback(shutil.rmtree, p.workdir, ignore_errors=True)
        self._mesh = make_mesh(p.config.mesh)
        self.program = make_program(p.config, self._mesh, num_examples=len(p.source), num_classes=p.source.num_classes)
        self._hooks = self._cleanup.enter_context(_hooks(p, self._mesh, self.program))
        batches = train.feed(p, self._mesh, 0, 1_000_000_000, say=lambda line: None)
        self._batches: Iterator[Any] = self._cleanup.enter_context(contextlib.closing(batches))
        self._state, self._batch = self.program.new_state(), None

    def close(self) -> None:
        """Ends the workers and deletes the folder."""
        self._cleanup.close()

    def loop(self, steps: int) -> None:
        """Steps as a run makes them."""
        import jax

        from maejax import train

        batches = itertools.islice(self._batches, steps)
        self._state = train.loop(self.program.train_step, self._state, batches, self._hooks, self._done)
        self._done += steps
        jax.block_until_ready(self._state)

    def bare(self, steps: int) -> None:
        """Calls of the compiled step on a batch that lies on the devices."""
        import jax

        for _ in range(steps):
            self._state, _ = self.program.train_step(self._state, self._batch)
        jax.block_until_ready(self._state)

    def measure(self, windows: int, steps: int) -> dict[str, Any]:
        """What --json prints, but for the start."""
        import jax

        from maejax import build

        self.loop(2)
        start = time.perf_counter()
        self.loop(1)
        all_of_it = 2 * windows * (steps + AHEAD) * (time.perf_counter() - start)
        print(f"{windows} windows of {steps} steps take about {duration(all_of_it)}", file=sys.stderr, flush=True)
        self._batch = next(self._batches).batch
        side, product = _product(jax.devices()[0].platform, self._plan.config.dtype)
        seconds: dict[str, list[float]] = {"bare": [], "loop": [], "product": []}
        kinds: list[tuple[str, Callable[[int], None], int]] = [
            ("bare", self.bare, steps), ("loop", self.loop, steps), ("product", product, 3)
        ]  # fmt: skip
        for window in range(windows):
            for name, function, count in kinds if window % 2 == 0 else kinds[::-1]:
                function(AHEAD)
                start = time.perf_counter()
                function(count)
                seconds[name].append((time.perf_counter() - start) / count)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        c, devices = self._plan.config, jax.device_count()
        a_image = build.flops_per_image(c)
        model, reached = a_image * c.batch_size / median["bare"] / devices, 2 * side**3 / median["product"]
        ratios = [loop / bare for loop, bare in zip(seconds["loop"], seconds["bare"], strict=True)]
        return {
            "model": f"ViT-{c.model.size}/{configs.pair(c.model.patch)[0]}", "image_size": configs.pair(c.image_size),
            "batch_size": c.batch_size, "dtype": c.dtype, "devices": devices, "device": jax.devices()[0].device_kind,
            "windows": windows, "steps": steps, "loop_over_bare": statistics.median(ratios),
            "bare_ms": 1e3 * median["bare"], "loop_ms": 1e3 * median["loop"],
            "img_per_sec": c.batch_size / median["bare"], "loop_img_per_sec": c.batch_size / median["loop"],
            "gflop_per_image": a_image / 1e9, "model_tflops_per_device": model / 1e12,
            "product_side": side, "product_tflops": reached / 1e12, "step_over_product": model / reached,
            "xla_over_analytic": self.flops() / (a_image * c.batch_size), **self.memory(),
        }  # fmt: skip

    def flops(self) -> float:
        """That XLA counts in a step of all devices: of the step with its blocks one after the other, because it counts
        the body of a loop once.
        """
        from maejax.program import make_program

        p = self._plan
        c = override(p.config, {"model.scan": "false"})
        unrolled = make_program(c, self._mesh, num_examples=len(p.source), num_classes=p.source.num_classes)
        return float(unrolled.train_step.lower(unrolled.shapes, unrolled.batch).cost_analysis()["flops"])

    def memory(self) -> dict[str, float]:
        """GB of a device: what the compiled step is given, what it needs besides; the most in use, if that is known."""
        import jax

        sizes = self.program.train_step.lower(self.program.shapes, self.program.batch).compile().memory_analysis()
        found = {"arguments_gb": sizes.argument_size_in_bytes / 1e9, "temporaries_gb": sizes.temp_size_in_bytes / 1e9}
        stats = jax.local_devices()[0].memory_stats() or {}
        return found | ({"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {})


@contextlib.contextmanager
def _hooks(p: "Plan", mesh: Any, program: "Program") -> Iterator[list[Any]]:
    """What a run does after every step."""
    from maejax.checkpoint import Checkpoints
    from maejax.metrics import Console, open_writers
    from maejax.signals import Interruption
    from maejax.surroundings import make_hooks

    c = p.config
    with contextlib.ExitStack() as cleanup:
        checkpoints = Checkpoints(p.workdir / "checkpoints", keep=1, say=lambda line: None)
        cleanup.callback(checkpoints.close)
        console = cleanup.enter_context(Console(p.workdir / "train.log", quiet=True))
        writers = open_writers(p.workdir, 0, configs.to_dict(c), tensorboard=c.tensorboard, wandb=False)
        for writer in writers:
            cleanup.callback(writer.close)
        meta: dict[str, Any] = {"bad_images": {}, "rollbacks": []}
        yield make_hooks(
            p, program, mesh, checkpoints, writers, console, Interruption(), lambda state, step: None,
            lambda state, step: None, first=0, meta=meta,
        )  # fmt: skip


def _product(platform: str, dtype: str) -> tuple[int, Callable[[int], None]]:
    """The side of two random square matrices, and a function that multiplies them so many times."""
    import jax
    import jax.numpy as jnp

    side = PRODUCT.get(platform, 8192)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    multiply = jax.jit(jnp.matmul)

    def times(count: int) -> None:
        jax.block_until_ready([multiply(a, b) for _ in range(count)])

    return side, times


def start_seconds(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds from the start of a process to its end after one step: nothing is compiled yet; everything is."""
    print("starting two processes, without compiled programs and with them", file=sys.stderr, flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start = time.perf_counter()
            command = [sys.executable, "-m", "maejax", "bench", "step", *arguments, "--first-step"]
            child = subprocess.run(
                command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            if child.returncode:
                raise MaejaxError(f"the process that measures the start failed: {child.stderr.strip()[-500:]}")
            found[f"{name}_start_seconds"] = time.perf_counter() - start
    return found | {"warm_over_cold": found["warm_start_seconds"] / found["cold_start_seconds"]}


def lines(result: dict[str, Any]) -> list[str]:
    """For people."""
    r = result
    height, width = r["image_size"]
    peak = f", {r['peak_gb']:.2f} at most in use" if "peak_gb" in r else ""
    return [
        f"step      {r['model']}, {height}x{width}, batch {r['batch_size']}, {r['dtype']}, "
        f"{r['devices']} x {r['device']}",
        f"bare      {r['bare_ms']:,.1f} ms, {r['img_per_sec']:,.1f} img/s, {r['model_tflops_per_device']:.3g} TFLOP/s "
        f"a device at {r['gflop_per_image']:.3g} GFLOP an image",
        f"product   {r['product_side']} x {r['product_side']}: {r['product_tflops']:.3g} TFLOP/s; the step reaches "
        f"{r['step_over_product']:.2f} of that",
        f"loop      {r['loop_ms']:,.1f} ms, {r['loop_img_per_sec']:,.1f} img/s: {r['loop_over_bare']:.3f} of the bare "
        "step",
        f"flops     XLA counts {r['xla_over_analytic']:.3f} of the analytic",
        f"memory    {r['arguments_gb']:.2f} GB of arguments, {r['temporaries_gb']:.2f} GB of temporaries{peak}",
        f"start     first step after {r['cold_start_seconds']:.1f} s, {r['warm_start_seconds']:.1f} s with compiled "
        f"programs: {r['warm_over_cold']:.2f}",
    ]  # fmt: skip
