"""What the training loop costs beyond the compiled step: wall time of the loop over that of the bare step.

    python benchmarks/loop_overhead.py            the ratio, medians of interleaved windows
    python benchmarks/loop_overhead.py --memory   host memory over 2,000 steps

The loop is `maejax.train.loop` with batches in memory, transfers, the log hook and its JSON lines; the bare step is the
same compiled function on one batch that lies on the device.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from maejax import build, hooks, train
from maejax import config as configs
from maejax.mesh import make_mesh, to_global
from maejax.metrics import Console, JsonLines
from maejax.optimizer import Schedule
from maejax.overrides import override
from maejax.state import init_state
from maejax.step import make_train_step


def batches_in_memory(c, count=8):
    """Random batches, again and again."""
    s, rng, made = build.shapes_of(c), np.random.default_rng(0), []
    for _ in range(count):
        order = np.stack([rng.permutation(s.patches) for _ in range(c.batch_size)]).astype(np.int32)
        made.append(
            {
                "image": rng.integers(0, 256, (c.batch_size, *s.image, s.channels), dtype=np.uint8),
                "visible": order[:, : s.visible],
                "masked": order[:, s.visible :],
                "index": np.zeros(c.batch_size, np.int64),
                "faults": np.full((c.batch_size, 4), -1),
            }
        )
    while True:
        yield from made


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="a window")
    options = parser.parse_args()

    c = override(configs.load("pretrain_digits"), {"data.split": "all", "total_steps": "1000000"})
    source = build.source_of(c)
    mesh = make_mesh(c.mesh)
    objective = build.make_objective(c)
    schedule: Schedule
    tx, schedule, _ = build.optimization(c, len(source))
    step = jax.jit(make_train_step(objective, tx, schedule), donate_argnums=0)
    init = jax.jit(functools.partial(init_state, objective, tx, build.example_batch(c, None), seed=0, ema=False))
    plan = train.Plan(config=c, workdir=Path("unused"), source=source)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(build, "training_batches", _in_memory):
        writer = JsonLines(Path(folder) / "metrics.jsonl")
        bad = hooks.CountBadImages(
            Path(folder) / "bad.jsonl", source.name, batch_size=c.batch_size, max_fraction=0.1, counts={}
        )

        def loop(state, count, at_end=()):
            log = hooks.LogMetrics(
                [writer], Console(quiet=True), every=20, total_steps=10**9, first_step=0, batch_size=c.batch_size,
                num_examples=len(source), flops_per_image=None, bad_images=bad,
            )  # fmt: skip
            state = train.loop(step, state, train.feed(plan, mesh, 0, count), [bad, log, *at_end], 0)
            log.flush()
            return jax.block_until_ready(state)

        def bare(state, count):
            for _ in range(count):
                state, _ = step(state, batch)
            return jax.block_until_ready(state)

        batch = jax.block_until_ready(to_global(_only_arrays(next(batches_in_memory(c))), mesh))
        state = loop(bare(init(), 5), 5)
        if options.memory:
            print(json.dumps(memory(loop, state)))
            return
        times = {"bare": [], "loop": []}
        for _ in range(options.windows):
            for name, run in (("bare", bare), ("loop", loop)):
                start = time.perf_counter()
                state = run(state, options.steps)
                times[name].append((time.perf_counter() - start) / options.steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {"loop_over_step": round(medians["loop"] / medians["bare"], 4)}
    result |= {f"{name}_ms": round(1e3 * value, 3) for name, value in medians.items()}
    print(json.dumps(result | {"batch_size": c.batch_size, "device": jax.devices()[0].device_kind}))


def memory(loop, state) -> dict[str, float]:
    """Host memory in MB at some of 2,000 steps."""
    at = {}

    def measure(end: hooks.StepEnd) -> None:
        if end.step in (200, 500, 1000, 1500, 2000):
            at[f"step_{end.step}"] = round(hooks.host_memory() / 1e6, 1)

    loop(state, 2000, [measure])
    return at


def _in_memory(c, source, *, first_step):
    return batches_in_memory(c)


def _only_arrays(batch):
    return {key: value for key, value in batch.items() if key not in ("index", "faults")}


if __name__ == "__main__":
    main()
