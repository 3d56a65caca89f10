"""Networks with weights that a seed decides, on numpy alone, and runs made of them. Nothing is trained."""

from pathlib import Path

import numpy as np

from maejax import config as configs
from maejax.convert.weights import Weights, network_shapes, save_run
from maejax.overrides import override

TINY = {
    "model.size": "B", "model.width": "48", "model.depth": "3", "model.heads": "4", "model.patch": "8",
    "image_size": "32", "decoder.width": "32", "decoder.depth": "2", "decoder.heads": "4", "total_steps": "1",
}  # fmt: skip


def seeded(changes: dict[str, str] | None = None, *, seed: int = 0, decoder: bool = True) -> Weights:
    """A tiny network (or a changed one) whose every number is random: norms, biases and tokens, too."""
    c = override(configs.default(), TINY | (changes or {}))
    parts = {"encoder", "decoder"} if decoder else {"encoder"}
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in sorted(network_shapes(c, parts, 0).items()):
        if name.endswith("/pos_embed"):
            continue
        draw = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("kernel"):
            inner = shape[1:] if "/blocks/" in name else shape
            draw *= np.float32((inner[0] * (inner[1] if "proj" in name else 1)) ** -0.5)
        elif name.endswith("scale"):
            draw = 1 + 0.1 * draw
        else:
            draw *= np.float32(0.1)
        arrays[name] = draw.astype(np.float32)
    return Weights(c, arrays, {"source": None, "license": None})


def seeded_run(folder: Path, changes: dict[str, str] | None = None, **kwargs) -> Weights:
    """The same as a run in `folder`."""
    weights = seeded(changes, **kwargs)
    folder.mkdir(parents=True)
    save_run(weights, folder)
    return weights
