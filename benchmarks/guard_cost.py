"""What the guards of a step cost: the guarded step over one without a guard, and a comparison of replicas.

    python benchmarks/guard_cost.py                      ViT-Ti/4, one device
    python benchmarks/guard_cost.py --devices=8          and a state that is whole on eight virtual ones

Steps of both kinds take turns in one process; ratios are medians over pairs, of wall time and of CPU time. Between
them, for every step, the host reads the guard's verdict on the step before, as the run's hook does. A comparison is
spread over the default interval.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from maejax import build, program, step
from maejax import config as configs
from maejax.guard import new_guard
from maejax.interruption import StepEnd
from maejax.mesh import make_mesh, to_global
from maejax.overrides import override
from maejax.replicas import CompareReplicas
from maejax.skips import WatchSkips


def unguarded(state_guard, loss, norm, *, spike):
    """Accepts everything, which the compiler knows: no branch is left in the step."""
    return True, state_guard


def always(accepted, update, keep, *operands):
    """Instead of `lax.cond`."""
    return update(*operands)


def clock(run):
    """(seconds, CPU seconds) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)

    c = override(configs.load("pretrain_vit_ti4_cifar10"), {"batch_size": str(options.batch), "sharding": "replicate"})
    mesh, shapes, rng = make_mesh(c.mesh), build.shapes_of(c), np.random.default_rng(0)
    order = np.stack([rng.permutation(shapes.patches) for _ in range(c.batch_size)]).astype(np.int32)
    image = rng.integers(0, 256, (c.batch_size, *shapes.image, shapes.channels), dtype=np.uint8)
    batch = to_global(
        {"image": image, "visible": order[:, : shapes.visible], "masked": order[:, shapes.visible :]}, mesh
    )
    make = functools.partial(program.make_program, c, mesh, num_examples=50_000, num_classes=None)
    guarded = make()
    state = {"guarded": guarded.new_state(), "bare": guarded.new_state()}
    run = {"guarded": guarded.train_step.lower(guarded.shapes, guarded.batch).compile()}
    with mock.patch.object(step, "judge", unguarded), mock.patch.object(jax.lax, "cond", always):
        run["bare"] = make().train_step.lower(guarded.shapes, guarded.batch).compile()
    watch = WatchSkips(Path("unused"), print, rollbacks=[], limit=5)
    number = 0

    def one(kind):
        state[kind], metrics = run[kind](state[kind], batch)
        jax.block_until_ready(state[kind])
        if kind == "guarded":
            watch(StepEnd(step=number, state=state[kind], metrics=metrics, data_wait=0.0, faults=()))

    times = {"guarded": [], "bare": []}
    for number in range(options.pairs + 1):
        for kind in sorted(times, reverse=number % 2 == 0):
            times[kind].append(clock(functools.partial(one, kind)))
    ratios = [
        [g[k] / b[k] for g, b in zip(times["guarded"][1:], times["bare"][1:], strict=True) if b[k]] for k in (0, 1)
    ]
    bare = [statistics.median(t[k] for t in times["bare"][1:]) for k in (0, 1)]
    result = {
        "guarded_over_bare_wall": round(statistics.median(ratios[0]), 4),
        "guarded_over_bare_cpu": round(statistics.median(ratios[1]), 4),
        "bare_ms": round(1e3 * bare[0], 1), "bare_cpu_ms": round(1e3 * bare[1], 1),
        "temp_mb": {k: round(r.memory_analysis().temp_size_in_bytes / 1e6, 1) for k, r in run.items()},
    }  # fmt: skip
    if options.devices > 1:
        compare = CompareReplicas(guarded.shapes, mesh, every=1)
        end = StepEnd(step=1, state=state["guarded"], metrics={}, data_wait=0.0, faults=())
        took = [clock(lambda: compare.now(end)) for _ in range(11)][1:]
        ms = [1e3 * statistics.median(t[k] for t in took) for k in (0, 1)]
        share = [ms[k] / 1e3 / c.guard.compare_steps / bare[k] for k in (0, 1)]
        result |= {
            "comparison_ms": round(ms[0], 1), "comparison_cpu_ms": round(ms[1], 1),
            "comparison_share_wall": round(share[0], 5), "comparison_share_cpu": round(share[1], 5),
        }  # fmt: skip
    assert set(new_guard()) == set(state["guarded"].guard)
    print(json.dumps(result | {"batch_size": c.batch_size, "device": f"{options.devices} x {jax.devices()[0]}"}))


if __name__ == "__main__":
    main()
