"""From a config to the parts of a run. Beside `train` and `cli` this is the only module that unpacks one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maejax import config as configs
from maejax.data.masking import SAMPLERS, num_visible
from maejax.data.pipeline import default_workers, eval_batches, train_batches
from maejax.data.sources import Source, make_source
from maejax.data.transforms import CROPS
from maejax.errors import UsageError, import_object, look_up
from maejax.evals import EVALS
from maejax.models import SIZES, Decoder, ViT
from maejax.models.layers import REMAT
from maejax.objectives import OBJECTIVES
from maejax.objectives.mae import train_flops
from maejax.optimizer import Schedule, make_optimizer, make_schedule
from maejax.sharding import PRESETS


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
    for name in eval_names(c):
        look_up(EVALS, name, "evals")
    if width % heads or width % 4:
        raise UsageError(f"the encoder's width {width} must be divisible by 4 and by its {heads} heads")
    if heads % max(c.mesh.tensor, 1) or c.decoder.heads % max(c.mesh.tensor, 1):
        raise UsageError(f"mesh.tensor={c.mesh.tensor} must divide the {heads} and {c.decoder.heads} attention heads")


def eval_names(c: ConfigDict) -> list[str]:
    """The evaluations that a config asks for."""
    return [name for name in c.evals.replace(" ", "").split(",") if name and name != "none"]


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


def training_batches(c: ConfigDict, source: Source, *, first_step: int) -> Any:
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


# ---- For people -----------------------------------------------------------------------------------------------------


def describe(c: ConfigDict, source: Source, mesh: Mesh, num_parameters: int) -> Iterator[str]:
    """A run in a few lines, before it starts."""
    n, s = len(source), shapes_of(c)
    width, depth, _ = encoder_size(c)
    devices, per_step = jax.device_count(), c.batch_size // c.grad_accum_steps
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    total, warmup = (configs.steps(c, name, n) for name in ("total", "warmup"))
    yield f"data      {c.data.source}: {n:,} images, id {source.fingerprint()}"
    yield (
        f"model     ViT-{c.model.size} {width} x {depth}, image {s.image[0]}x{s.image[1]} in patches of "
        f"{s.patch[0]}x{s.patch[1]}; decoder {c.decoder.width} x {c.decoder.depth}; "
        f"{num_parameters / 1e6:.2f} M parameters, {c.dtype}"
    )
    yield (
        f"mask      {c.mask.sampler} {c.mask.ratio:g}: {s.visible} of {s.patches} patches visible; "
        f"{flops_per_image(c) / 1e9:.3g} GFLOP an image and step"
    )
    yield f"mesh      {axes}, {c.sharding}, {devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}"
    if mesh.shape["tensor"] > 1:
        yield f"          {mesh.shape['tensor']} devices share each row of a batch (tensor)"
    local = devices // jax.process_count() // mesh.shape["tensor"] or 1
    yield (
        f"batch     {c.batch_size} = {jax.process_count()} processes x {local} devices x {per_step // shards} "
        f"per device x {c.grad_accum_steps} accumulation"
    )
    yield f"lr        {c.base_lr * c.batch_size / 256:.3g} = base_lr {c.base_lr:g} x {c.batch_size} / 256"
    yield f"length    {total:,} steps = {total * c.batch_size / n:.4g} epochs, warm-up {warmup:,} steps"
    if warmup >= total:
        yield "note      the run is over before its warm-up is; set --config.warmup_steps for a short one"
