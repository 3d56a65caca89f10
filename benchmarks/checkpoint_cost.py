"""What it costs that checkpoints prove themselves: saving and restoring with manifests beside Orbax alone.

    python benchmarks/checkpoint_cost.py --config=pretrain_vit_b16_imagenet --folder=build/checkpoints

Saves and restores the whole state of a recipe (ViT-B/16: 1.3 GB), both ways in turn, and prints medians and ratios.
Files stay in the page cache, as after a crash of the run and unlike after one of the machine: from a cold disk both
ways take longer, and the ratio falls.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from maejax import config as configs
from maejax.checkpoint import Checkpoints
from maejax.manifest import verify
from maejax.mesh import make_mesh
from maejax.program import make_program
from maejax.state import TrainState, not_finite
from maejax.stored import as_dict


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain_vit_b16_imagenet")
    parser.add_argument("--folder", type=Path, default=Path("build/checkpoints"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = configs.load(options.config)
    program = make_program(config, make_mesh(config.mesh), num_examples=10_000, num_classes=None)
    rng = np.random.default_rng(0)  # not zeros, which compress
    state = jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32).astype(x.dtype), x.sharding), program.shapes
    )
    shutil.rmtree(options.folder, ignore_errors=True)
    times: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for name, value in one_round(options.folder.absolute() / str(number), state, program.shapes).items():
            times.setdefault(name, []).append(value)
        shutil.rmtree(options.folder)
    middle = {name: round(statistics.median(values), 4) for name, values in times.items()}
    middle["gigabytes"] = round(sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9, 3)
    middle["restore ratio"] = round(middle["restore and verify"] / middle["restore, Orbax"], 3)
    middle["save ratio, blocking"] = round(middle["save, blocking"] / middle["save, blocking, Orbax"], 3)
    print(json.dumps(middle, indent=1))


def one_round(folder: Path, state: TrainState, shapes: TrainState) -> dict[str, float]:
    """Seconds of everything, once."""
    found: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        found[name] = time.perf_counter() - start

    orbax = ocp.StandardCheckpointer()
    start = time.perf_counter()
    orbax.save(folder / "plain", as_dict(state))
    timed("save, blocking, Orbax", start)
    orbax.wait_until_finished()
    timed("save, all, Orbax", start)

    ours = Checkpoints(folder / "checkpoints", keep=1, say=print)
    start = time.perf_counter()
    not_finite(state)
    timed("check that all is finite", start)
    start = time.perf_counter()
    ours.save(state, {})
    timed("save, blocking", start)
    ours.wait()
    timed("save, all", start)

    start = time.perf_counter()
    jax.block_until_ready(orbax.restore(folder / "plain", as_dict(shapes)))
    timed("restore, Orbax", start)
    start = time.perf_counter()
    verify(folder / "checkpoints" / str(int(state.step)))
    timed("verify", start)
    jax.block_until_ready(ours.restore(int(state.step), shapes))
    timed("restore and verify", start)
    ours.close()
    orbax.close()
    return found


if __name__ == "__main__":
    main()
