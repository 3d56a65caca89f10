"""From a config to the parts of a run. Beside `train` and `cli` this is the only module that unpacks one."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from maejax import config as configs
from maejax.checkpoint import load_weights, newest_verified
from maejax.data.decode import decode
from maejax.data.masking import SAMPLERS, masks_for, num_visible
from maejax.data.pipeline import default_workers, eval_batches, train_batches
from maejax.data.sources import Source, make_source
from maejax.data.transforms import CROPS, center
from maejax.errors import UsageError, import_object, look_up
from maejax.models import SIZES, Decoder, ViT
from maejax.models.layers import REMAT
from maejax.objectives import OBJECTIVES
from maejax.objectives.mae import train_flops
from maejax.optimizer import Schedule, make_optimizer, make_schedule
from maejax.sharding import PRESETS
from maejax.tree import PyTree
from maejax.visualize import grid, reconstruct
from maejax.workdir import stored_config


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes that follow from a config."""

    image: tuple[int, int]  # height, width
    patch: tuple[int, int]
    channels: int
    ratio: float  # of hidden patches

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def patches(self) -> int:
        """n."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """v."""
        return num_visible(self.patches, self.ratio)

    @property
    def pixels(self) -> int:
        """Of one patch, times channels."""
        return self.patch[0] * self.patch[1] * self.channels


def shapes_of(c: ConfigDict) -> Shapes:
    """The sizes of a config."""
    return Shapes(configs.pair(c.image_size), configs.pair(c.model.patch), c.data.channels, c.mask.ratio)


def check_names(c: ConfigDict) -> None:
    """Raises UsageError for a name in the config that is in no table; needs no device."""
    look_up(SIZES, c.model.size, "model.size")
    look_up(REMAT, c.model.remat, "model.remat")
    look_up(PRESETS, c.sharding, "sharding")
    look_up(SAMPLERS, c.mask.sampler, "mask.sampler")
    look_up(CROPS, c.data.crop, "data.crop")
    objective_class(c)
    width, _, heads = encoder_size(c)
    if width % heads or width % 4:
        raise UsageError(f"the encoder's width {width} must be divisible by 4 and by its {heads} heads")
    if heads % max(c.mesh.tensor, 1) or c.decoder.heads % max(c.mesh.tensor, 1):
        raise UsageError(f"mesh.tensor={c.mesh.tensor} must divide the {heads} and {c.decoder.heads} attention heads")


def encoder_size(c: ConfigDict) -> tuple[int, int, int]:
    """Width, depth and heads: the named size's, unless the config sets them."""
    width, depth, heads = look_up(SIZES, c.model.size, "model.size")
    return c.model.width or width, c.model.depth or depth, c.model.heads or heads


def make_encoder(c: ConfigDict) -> ViT:
    """The encoder of a config."""
    width, depth, heads = encoder_size(c)
    return ViT(
        patch=configs.pair(c.model.patch),
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=c.model.mlp_ratio,
        cls_token=c.model.cls_token,
        mask_tokens=c.model.mask_tokens,
        mean=c.data.mean,
        std=c.data.std,
        dtype=jnp.dtype(c.dtype),
        scan=c.model.scan,
        remat=c.model.remat,
    )


def objective_class(c: ConfigDict) -> Any:
    """The class that the config names, from the table or from outside the package."""
    if ":" in c.objective:
        return import_object(c.objective, "objective")
    return look_up(OBJECTIVES, c.objective, "objective")


def make_objective(c: ConfigDict) -> nn.Module:
    """The objective of a config, with its encoder and decoder."""
    decoder = Decoder(
        pixels=shapes_of(c).pixels,
        width=c.decoder.width,
        depth=c.decoder.depth,
        heads=c.decoder.heads,
        cls_token=c.model.cls_token,
        mask_tokens=c.model.mask_tokens,
        dtype=jnp.dtype(c.dtype),
        scan=c.model.scan,
        remat=c.model.remat,
    )
    return objective_class(c)(encoder=make_encoder(c), decoder=decoder, norm_pix=c.norm_pix)


def example_batch(c: ConfigDict, num_classes: int | None) -> dict[str, np.ndarray]:
    """One row of what the objective is given, for its shapes."""
    s = shapes_of(c)
    order = np.arange(s.patches, dtype=np.int32)[None]
    batch: dict[str, np.ndarray] = {
        "image": np.zeros((1, *s.image, s.channels), np.uint8),
        "visible": order[:, : s.visible],
        "masked": order[:, s.visible :],
    }
    if num_classes is not None:
        batch["label"] = np.zeros(1, np.int32)
    return batch


def optimization(c: ConfigDict, num_examples: int) -> tuple[optax.GradientTransformation, Schedule, int]:
    """The optimizer, its schedule and the number of steps."""
    total = configs.steps(c, "total", num_examples)
    warmup = configs.steps(c, "warmup", num_examples)
    if warmup > total:
        raise UsageError(f"the warm-up of {warmup} steps is longer than the run of {total}; shorten warmup_*")
    schedule = make_schedule(
        base_lr=c.base_lr, min_lr=c.min_lr, batch_size=c.batch_size, warmup_steps=warmup, total_steps=total
    )
    o = c.optimizer
    tx = make_optimizer(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
    return tx, schedule, total


def flops_per_image(c: ConfigDict) -> float:
    """Of one training step of masked autoencoding, by the analytic formula."""
    s = shapes_of(c)
    width, depth, _ = encoder_size(c)
    return train_flops(
        patches=s.patches,
        visible=s.visible,
        pixels=s.pixels,
        width=width,
        depth=depth,
        mlp_ratio=c.model.mlp_ratio,
        cls_token=c.model.cls_token,
        mask_tokens=c.model.mask_tokens,
        decoder_width=c.decoder.width,
        decoder_depth=c.decoder.depth,
    )


# ---- Data -----------------------------------------------------------------------------------------------------------


def source_of(c: ConfigDict, *, evaluation: bool = False) -> Source:
    """The images to train on, or those to evaluate on."""
    return make_source(c.data.source, split=c.data.eval_split if evaluation else c.data.split, data_dir=c.data.dir)


def training_batches(c: ConfigDict, source: Source, *, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of every batch from `first_step` on."""
    s, d = shapes_of(c), c.data
    batches = train_batches(
        source,
        image_size=s.image,
        patch=s.patch,
        channels=s.channels,
        mask_ratio=c.mask.ratio,
        mask_sampler=c.mask.sampler,
        crop=d.crop,
        crop_scale=d.crop_scale,
        crop_ratio=d.crop_ratio,
        flip=d.flip,
        color_jitter=d.color_jitter,
        max_pixels=d.max_pixels,
        batch_size=c.batch_size,
        seed=c.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_step=first_step,
        workers=default_workers() if d.workers is None else d.workers,
        prefetch=d.prefetch,
    )
    return iter(batches)


def ordered_batches(
    c: ConfigDict, source: Source, *, batch_size: int, indices: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """A source's images in order, center crop, the last batch padded."""
    s = shapes_of(c)
    return iter(
        eval_batches(
            source,
            image_size=s.image,
            channels=s.channels,
            max_pixels=c.data.max_pixels,
            batch_size=batch_size,
            indices=indices,
        )
    )


# ---- Pictures -------------------------------------------------------------------------------------------------------


class Painter:
    """Draws what a network reconstructs of some images, always under the same masks."""

    def __init__(self, c: ConfigDict, objective: nn.Module, images: np.ndarray, *, seed: int = 0):
        s = shapes_of(c)
        self._c, self._shapes, self._images = c, s, images
        self._visible, self._masked = masks_for(
            len(images), grid=s.grid, num_visible=s.visible, sampler=c.mask.sampler, seed=seed
        )
        self._predict = jax.jit(lambda weights, *batch: objective.apply({"params": weights}, *batch, method="predict"))

    def draw(self, weights: PyTree, path: Path, caption: str) -> np.ndarray:
        """Writes the picture to `path`; returns its pixels, uint8 (h w 3)."""
        predicted = self._predict(weights, self._images, self._visible, self._masked)
        columns = reconstruct(
            self._images,
            self._visible,
            self._masked,
            np.asarray(jax.device_get(predicted), np.float32),
            patch=self._shapes.patch,
            mean=self._c.data.mean,
            std=self._c.data.std,
            norm_pix=self._c.norm_pix,
        )
        picture = grid(columns, caption=caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return np.asarray(picture)


def preview_images(c: ConfigDict, source: Source, count: int = 8) -> np.ndarray:
    """Some images from all over a source, uint8 (b h w c)."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))
    batch = next(ordered_batches(c, source, batch_size=len(indices), indices=indices))
    return batch["image"][batch["valid"]] if batch["valid"].any() else batch["image"]


def images_of_files(c: ConfigDict, paths: Sequence[Path]) -> np.ndarray:
    """Image files, resized and center-cropped as a config's images, uint8 (b h w c)."""
    s = shapes_of(c)
    images = [decode(path.read_bytes(), channels=s.channels, max_pixels=c.data.max_pixels) for path in paths]
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
    c = config_of_run(run)
    objective = make_objective(c)
    shapes = jax.eval_shape(objective.init, jax.random.key(0), example_batch(c, None))["params"]
    return c, objective, load_weights(newest_verified(run), shapes)


def load_encoder(run: str | Path) -> tuple[ViT, PyTree]:
    """The encoder of a run and its newest intact weights.

    `encoder.apply({"params": params}, images)` maps images (b h w c), uint8 or already normalised float32, of any size
    that the patch divides, to tokens (b [1+]n d): the class token first, then all patches, none masked. Nothing is
    random.

    Raises:
      UsageError: `run` is not a run's folder or has no checkpoint yet.
      NoValidCheckpoint: none of its checkpoints is intact.
    """
    _, objective, weights = load_objective(Path(run))
    encoder: Any = objective
    return encoder.encoder, weights["encoder"]
