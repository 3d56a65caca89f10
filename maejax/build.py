"""From a config to the parts of a run. Beside `train` and `cli` this is the only module that unpacks one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maejax import config as configs
from maejax.data.masking import SAMPLERS, Mask, num_visible
from maejax.data.pipeline import default_workers, eval_batches, train_batches
from maejax.data.sources import Source, make_source
from maejax.data.transforms import CROPS, Augment
from maejax.data.workers import Stream
from maejax.errors import UsageError, import_object, look_up
from maejax.evals import EVALS
from maejax.mesh import process_share
from maejax.models import MLP_RATIOS, SIZES, Decoder, ViT
from maejax.models.layers import REMAT
from maejax.objectives import OBJECTIVES, classify, mae
from maejax.optimizer import Schedule, layer_scales, make_optimizer, make_schedule
from maejax.overrides import override
from maejax.sharding import PRESETS

Gather = Callable[[Any], Any] | None


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
    width, depth, heads = encoder_size(c)
    for name in eval_names(c):
        look_up(EVALS, name, "evals")
        if EVALS[name].method == "logits" and not classifies(c):
            raise UsageError(f"evals={name} needs a classifier (objective=classify); use knn or linear")
    if (c.finetune.blocks or 0) > depth:
        raise UsageError(f"finetune.blocks={c.finetune.blocks} is more than the encoder's {depth} blocks")
    if width % heads or width % 4:
        raise UsageError(f"the encoder's width {width} must be divisible by 4 and by its {heads} heads")
    if heads % max(c.mesh.tensor, 1) or c.decoder.heads % max(c.mesh.tensor, 1):
        raise UsageError(f"mesh.tensor={c.mesh.tensor} must divide the {heads} and {c.decoder.heads} attention heads")


def eval_names(c: ConfigDict) -> list[str]:
    """The evaluations that a config asks for."""
    return [name for name in c.evals.replace(" ", "").split(",") if name and name != "none"]


def classifies(c: ConfigDict) -> bool:
    """Whether a run trains a classifier: its batches have no masks, its images need labels."""
    return c.objective == "classify"


def encoder_size(c: ConfigDict) -> tuple[int, int, int]:
    """Width, depth and heads: the named size's, unless the config sets them."""
    width, depth, heads = look_up(SIZES, c.model.size, "model.size")
    return c.model.width or width, c.model.depth or depth, c.model.heads or heads


def mlp_ratio(c: ConfigDict) -> float:
    """Hidden units over width: the config's, unless it has the default and the named size another one."""
    named = MLP_RATIOS.get(c.model.size, 4.0) if c.model.width is None else 4.0
    return named if c.model.mlp_ratio == 4.0 else c.model.mlp_ratio


def make_encoder(c: ConfigDict, gather: Gather = None, platform: str = "cpu") -> ViT:
    """The encoder of a config; `gather` collects a layer's parameters where a mesh has split them."""
    width, depth, heads = encoder_size(c)
    return ViT(
        patch=configs.pair(c.model.patch),
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio(c),
        cls_token=c.model.cls_token,
        mask_tokens=c.model.mask_tokens,
        positions=c.model.positions,
        norm=not (classifies(c) and c.finetune.pool == "mean"),
        drop_path=c.model.drop_path,
        trained=c.finetune.blocks if classifies(c) else None,
        mean=c.data.mean,
        std=c.data.std,
        dtype=jnp.dtype(c.dtype),
        scan=c.model.scan,
        remat=c.model.remat,
        gather=gather,
        platform=platform,
    )


def with_classes(c: ConfigDict, source: Source) -> ConfigDict:
    """A classifier's config with the number of classes filled in; raises UsageError if the images have no labels."""
    if not source.num_classes:
        raise UsageError(f"{c.data.source} has no labels; a folder needs a subfolder for each of its classes")
    if c.finetune.num_classes not in (None, source.num_classes):
        raise UsageError(
            f"finetune.num_classes={c.finetune.num_classes}, but {c.data.source} has {source.num_classes} classes; "
            "leave it unset"
        )
    return override(c, {"finetune.num_classes": str(source.num_classes)})


def objective_class(c: ConfigDict) -> Any:
    """The class that the config names, from the table or from outside the package."""
    if ":" in c.objective:
        return import_object(c.objective, "objective")
    return look_up(OBJECTIVES, c.objective, "objective")


def make_objective(c: ConfigDict, gather: Gather = None, platform: str = "cpu") -> nn.Module:
    """The objective of a config, with all that belongs to it; `gather` and `platform` as for `make_encoder`."""
    if classifies(c):
        f = c.finetune
        return classify.Classifier(
            encoder=make_encoder(c, gather, platform), num_classes=f.num_classes, pool=f.pool, batch_norm=f.batch_norm,
            head_std=f.head_std, smoothing=f.smoothing, mixup=f.mixup, cutmix=f.cutmix,
        )  # fmt: skip
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
        gather=gather, platform=platform,
    )  # fmt: skip
    return objective_class(c)(encoder=make_encoder(c, gather, platform), decoder=decoder, norm_pix=c.norm_pix)


def example_batch(c: ConfigDict, num_classes: int | None) -> dict[str, np.ndarray]:
    """One row of what the objective is given, for its shapes."""
    s = shapes_of(c)
    order = np.arange(s.patches, dtype=np.int32)[None]
    batch: dict[str, np.ndarray] = {"image": np.zeros((1, *s.image, s.channels), np.uint8)}
    if not classifies(c):
        batch |= {"visible": order[:, : s.visible], "masked": order[:, s.visible :]}
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
    o, trained = c.optimizer, c.finetune.blocks if classifies(c) else None
    scales = None
    if o.layer_decay != 1 or trained is not None:
        depth = encoder_size(c)[1]
        scales = functools.partial(layer_scales, depth=depth, decay=o.layer_decay, trained=trained)
    tx = make_optimizer(
        schedule, name=o.name, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
        decay_tokens=not classifies(c), scales=scales,
    )  # fmt: skip
    return tx, schedule, total


def flops_per_image(c: ConfigDict) -> float:
    """Of one training step, by the analytic formula."""
    s = shapes_of(c)
    width, depth, _ = encoder_size(c)
    if classifies(c):
        return classify.train_flops(
            patches=s.patches, pixels=s.pixels, width=width, depth=depth, mlp_ratio=mlp_ratio(c),
            cls_token=c.model.cls_token, trained=c.finetune.blocks,
        )  # fmt: skip
    return mae.train_flops(
        patches=s.patches,
        visible=s.visible,
        pixels=s.pixels,
        width=width,
        depth=depth,
        mlp_ratio=mlp_ratio(c),
        cls_token=c.model.cls_token,
        mask_tokens=c.model.mask_tokens,
        decoder_width=c.decoder.width,
        decoder_depth=c.decoder.depth,
    )


# ---- Data -----------------------------------------------------------------------------------------------------------


def source_of(c: ConfigDict, *, evaluation: bool = False) -> Source:
    """The images to train on, or those to evaluate on."""
    return make_source(c.data.source, split=c.data.eval_split if evaluation else c.data.split, data_dir=c.data.dir)


def training_transforms(c: ConfigDict) -> list[Any]:
    """What is done to each loaded image: crop, flip and color, then a mask unless a classifier is trained."""
    s, d = shapes_of(c), c.data
    mean = np.broadcast_to(np.asarray(d.mean), s.channels)
    augment = Augment(
        size=s.image, crop=d.crop, scale=d.crop_scale, ratio=d.crop_ratio, flip=d.flip, color_jitter=d.color_jitter,
        rand_augment=d.rand_augment, erasing=d.erasing, fill=tuple(int(value) for value in np.rint(255 * mean)),
    )  # fmt: skip
    return [augment] + ([] if classifies(c) else [Mask(sampler=c.mask.sampler, grid=s.grid, visible=s.visible)])


def training_batches(c: ConfigDict, source: Source, mesh: Mesh, *, first_step: int, **watched: Any) -> Stream:
    """This process's rows of every batch from `first_step` on; `watched` are `unusable` and `say` of the stream."""
    d = c.data
    part, parts = process_share(mesh, jax.process_index())
    return train_batches(
        source,
        training_transforms(c),
        channels=d.channels,
        max_pixels=d.max_pixels,
        batch_size=c.batch_size,
        seed=c.seed,
        process_index=part,
        process_count=parts,
        start_step=first_step,
        workers=default_workers() if d.workers is None else d.workers,
        prefetch=d.prefetch,
        record_seconds=d.record_seconds,
        cache=d.cache,
        repeats=d.repeats,
        fast=d.resize == "fast",
        **watched,
    )


def ordered_batches(
    c: ConfigDict,
    source: Source,
    *,
    batch_size: int,
    indices: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """A source's images in order, center crop, the last batch padded; of each batch this process's rows."""
    s = shapes_of(c)
    return iter(
        eval_batches(
            source,
            image_size=s.image,
            channels=s.channels,
            max_pixels=c.data.max_pixels,
            batch_size=batch_size,
            share=c.data.eval_crop,
            indices=indices,
            process_index=process_index,
            process_count=process_count,
        )
    )
