"""What can be done with a run's weights: look at reconstructions, measure them, start from them."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from maejax import build
from maejax.data.decode import decode
from maejax.data.files import read_image_file
from maejax.data.masking import masks_for
from maejax.data.transforms import center
from maejax.errors import UsageError
from maejax.evaluate import Evaluator, Results
from maejax.mesh import make_mesh
from maejax.processes import fetch
from maejax.stored import load_weights, newest_verified
from maejax.tree import PyTree
from maejax.visualize import grid, reconstruct
from maejax.workdir import stored_config

# ---- Pictures -------------------------------------------------------------------------------------------------------


class Painter:
    """Draws what a network reconstructs of some images, always under the same masks."""

    def __init__(self, c: ConfigDict, objective: nn.Module, images: np.ndarray, *, seed: int = 0):
        s = build.shapes_of(c)
        self._c, self._shapes, self._images = c, s, images
        self._visible, self._masked = masks_for(
            len(images), grid=s.grid, num_visible=s.visible, sampler=c.mask.sampler, seed=seed
        )
        self._predict = jax.jit(lambda weights, *batch: objective.apply({"params": weights}, *batch, method="predict"))

    def draw(self, weights: PyTree, path: Path | None, caption: str) -> np.ndarray:
        """Writes the picture to `path`, if one is given; returns its pixels, uint8 (h w 3)."""
        predicted = self._predict(weights, self._images, self._visible, self._masked)
        columns = reconstruct(
            self._images,
            self._visible,
            self._masked,
            fetch(predicted).astype(np.float32),
            patch=self._shapes.patch,
            mean=self._c.data.mean,
            std=self._c.data.std,
            norm_pix=self._c.norm_pix,
        )
        picture = grid(columns, caption=caption)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        return np.asarray(picture)


def preview_images(c: ConfigDict, count: int = 8) -> np.ndarray:
    """Some images from all over the split that a run is not trained on, where there is one, uint8 (b h w c)."""
    try:
        source = build.source_of(c, evaluation=True)
    except UsageError:  # there is no such split
        source = build.source_of(c)
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))
    batch = next(build.ordered_batches(c, source, batch_size=len(indices), indices=indices))
    return batch["image"][batch["valid"]] if batch["valid"].any() else batch["image"]


def images_of_files(c: ConfigDict, paths: Sequence[Path]) -> np.ndarray:
    """Image files, resized and center-cropped as a config's images, uint8 (b h w c)."""
    s = build.shapes_of(c)
    images = [decode(read_image_file(path), channels=s.channels, max_pixels=c.data.max_pixels) for path in paths]
    return np.stack([center(image, None, size=s.image) for image in images])


# ---- Finished runs --------------------------------------------------------------------------------------------------


def config_of_run(run: Path) -> ConfigDict:
    """The config of a run's folder; raises UsageError if it is none."""
    config = stored_config(run)
    if config is None:
        raise UsageError(f"{run} is not a run of maejax: it has no config.json")
    return config


def load_objective(run: Path) -> tuple[ConfigDict, nn.Module, PyTree]:
    """A run's config, objective and newest weights."""
    c, objective, variables = load_variables(run)
    return c, objective, variables["params"]


def load_variables(run: Path) -> tuple[ConfigDict, nn.Module, dict[str, PyTree]]:
    """A run's config, objective, and newest weights as "params", with what else the objective keeps."""
    c = config_of_run(run)
    objective = build.make_objective(c, platform=jax.devices()[0].platform)
    example = build.example_batch(c, c.finetune.num_classes)
    stats = dict(jax.eval_shape(objective.init, jax.random.key(0), example))
    params, checkpoint = stats.pop("params"), newest_verified(run)
    return c, objective, {"params": load_weights(checkpoint, params), **load_weights(checkpoint, stats, part="stats")}


def evaluate(run: Path, evaluator: Evaluator) -> tuple[int, Results]:
    """The step of a run's newest intact checkpoint and what its weights are worth, on all devices."""
    mesh = make_mesh({"dcn_data": 1, "data": -1, "fsdp": 1, "tensor": 1})
    _, objective, variables = load_variables(run)
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    return int(newest_verified(run).name), evaluator(objective, variables, mesh)
