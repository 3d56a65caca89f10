"""Refuses configs that cannot be, in one line each, before any device is touched and any data read."""

import math
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from maejax.config import DURATIONS, default, flatten, pair
from maejax.errors import UsageError, look_up
from maejax.redact import masked

LEAST = dict.fromkeys((  # the smallest value of a key, where it is set
    "batch_size", "grad_accum_steps", "keep_checkpoints", "decoder.depth", "decoder.width", "decoder.heads",
    "model.width", "model.depth", "model.heads", "data.channels", "data.prefetch", "data.max_pixels", "mesh.dcn_data",
    "eval_images", "guard.in_a_row", "finetune.num_classes",
), 1) | dict.fromkeys((
    "seed", "base_lr", "min_lr", "optimizer.b1", "optimizer.b2", "optimizer.weight_decay", "data.color_jitter",
    "finetune.mixup", "finetune.cutmix", "finetune.head_std", "finetune.blocks",
    "guard.max_rollbacks", "guard.compare_steps",
), 0)  # fmt: skip
POSITIVE = ("optimizer.eps", "optimizer.clip_norm", "model.mlp_ratio", "data.record_seconds")
# Larger than any run's, and small enough for 32 bits.
MOST = {"batch_size": 2**24, "total_steps": 2**31 - 1, "seed": 2**32 - 1}
CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "lars"),
    "model.positions": ("fixed", "learned"),
    "finetune.pool": ("mean", "cls"),
    "data.resize": ("exact", "fast"),
    "decoder.kind": ("self", "cross"),
}
SHARES = {  # keys that must lie in [0, 1], or below 1
    "data.max_bad_fraction": True, "data.erasing": True, "finetune.smoothing": False, "model.drop_path": False,
    "optimizer.b1": False, "optimizer.b2": False,
}  # fmt: skip


def check(c: ConfigDict) -> None:
    """Raises UsageError for the first thing that cannot be; needs no device and reads no data."""
    for problem in _problems(c):
        raise UsageError(problem)


def _problems(c: ConfigDict) -> Iterator[str]:
    yield from _problems_of_numbers(c)
    yield from _problems_of_durations(c)
    yield from _problems_of_shares(c)
    yield from _problems_of_data(c)
    if c.objective == "classify":
        yield from _problems_of_finetuning(c)
    if c.decoder.kind == "cross" and c.model.mask_tokens:
        yield "decoder.kind=cross reads visible patches alone; set --config.model.mask_tokens=false"
    if c.data.sides:
        yield from _problems_of_sides(c)
    if not 0 < c.mask.ratio < 1:
        yield f"mask.ratio={c.mask.ratio} must lie between 0 and 1, for example 0.75"
    values = dict(flatten(c))
    if c.guard.spike != 0 and not c.guard.spike > 1:
        yield f"guard.spike={c.guard.spike} must be more than 1, for example 20, or 0: no gradient is too large"
    if c.profile_steps is not None and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", c.profile_steps):
        yield f"profile_steps={c.profile_steps!r} must be FIRST:LAST, two numbers of steps, as in 100:110"
    elif c.profile_steps is not None and int(c.profile_steps.split(":")[0]) > int(c.profile_steps.split(":")[1]):
        yield f"profile_steps={c.profile_steps!r} ends before it begins; FIRST:LAST, as in 100:110"
    for key, allowed in CHOICES.items():
        look_up(dict.fromkeys(allowed), values[key], key)
    if c.batch_size % c.grad_accum_steps:
        yield f"batch_size={c.batch_size} is not divisible by grad_accum_steps={c.grad_accum_steps}"
    if len(c.image_size) not in (1, 2) or len(c.model.patch) not in (1, 2):
        yield f"image_size={c.image_size} and model.patch={c.model.patch} must be one number or two (height, width)"
    for axis, size, side in zip(("height", "width"), pair(c.image_size), pair(c.model.patch), strict=True):
        if side < 1 or size < 1 or size % side:
            near = max(side, 1) * max(round(size / max(side, 1)), 1)
            yield f"image {axis} {size} is not divisible by the patch's {side}; use --config.image_size={near}"
    for key, numbers in (("mean", c.data.mean), ("std", c.data.std)):
        if len(numbers) not in (1, c.data.channels):
            yield f"data.{key}={numbers} needs one value or one for each of the data.channels={c.data.channels}"
    if not all(value > 0 for value in c.data.std):
        yield f"data.std={c.data.std} must be positive"
    for key, between in (("crop_scale", c.data.crop_scale), ("crop_ratio", c.data.crop_ratio)):
        if len(between) != 2 or not 0 < between[0] <= between[1] or (key == "crop_scale" and between[1] > 1):
            yield f"data.{key}={between} must be two positive numbers, the smaller first, a scale at most 1"
    for name, part in (("model", c.model), ("decoder", c.decoder)):
        if part.width and part.heads and (part.width % part.heads or part.width % 4):
            yield f"{name}.width={part.width} must be divisible by 4 and by {name}.heads={part.heads}"
    if c.optimizer.ema_decay is not None and not 0 < c.optimizer.ema_decay < 1:
        yield f"optimizer.ema_decay={c.optimizer.ema_decay} must lie between 0 and 1, for example 0.9999"
    if c.data.workers is not None and c.data.workers < 0:
        yield f"data.workers={c.data.workers} must be 0 or more"
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        yield f"mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} must be positive; one of them may be -1"
    shards = math.prod(size for size in sizes[:2] if size != -1) * c.grad_accum_steps
    if c.batch_size % shards:
        yield f"batch_size={c.batch_size} is not divisible by mesh.data x mesh.fsdp x grad_accum_steps = {shards}"


def _problems_of_numbers(c: ConfigDict) -> Iterator[str]:
    values = dict(flatten(c))
    for key, usual in flatten(default()):
        value = values[key]
        if isinstance(value, str) and masked(value) != value:
            yield (
                f"{key}={masked(value)} holds what looks like a secret, and configs are kept in files; put it into the "
                "environment or a file of credentials"
            )
        if value is None and usual is not None:
            yield f"{key}=none must have a value, as {usual}"
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            yield f"{key}={value} must be finite"
        if usual and isinstance(usual, tuple) and not value:
            yield f"{key}={value} must have a value, as {usual}"
        if isinstance(usual, tuple) and all(isinstance(number, int) for number in usual):
            if not all(type(number) is int for number in numbers):
                yield f"{key}={value} must be whole numbers"
        if value is None:
            continue
        if key in LEAST and value < LEAST[key]:
            yield f"{key}={value} must be at least {LEAST[key]}"
        if key in POSITIVE and not value > 0:
            yield f"{key}={value} must be positive"
        if key in MOST and value > MOST[key]:
            yield f"{key}={value} must be at most {MOST[key]}"


def _problems_of_durations(c: ConfigDict) -> Iterator[str]:
    for name, default_value in DURATIONS.items():
        given = [f"{name}_{unit}" for unit in ("steps", "epochs", "examples") if c[f"{name}_{unit}"] is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} are both set; keep one of them"
        if not given and default_value is None:
            yield f"the run has no length: set one of {name}_steps, {name}_epochs, {name}_examples"
        for key in given:
            if c[key] < 0 or (c[key] == 0 and name not in ("warmup", "eval")):
                yield f"{key}={c[key]} must be positive"


def _problems_of_shares(c: ConfigDict) -> Iterator[str]:
    values = dict(flatten(c))
    for key, with_one in SHARES.items():
        if not (0 <= values[key] < 1 or (with_one and values[key] == 1)):
            yield f"{key}={values[key]} must lie between 0 and 1{'' if with_one else ', below 1'}"
    if not 0 < c.decoder.subset <= 1:
        yield f"decoder.subset={c.decoder.subset} must be more than 0 and at most 1, for example 0.5"
    if not 0 < c.data.eval_crop <= 1:
        yield f"data.eval_crop={c.data.eval_crop} must be more than 0 and at most 1, for example 0.875"
    if not 0 < c.optimizer.layer_decay <= 1:
        yield f"optimizer.layer_decay={c.optimizer.layer_decay} must be more than 0 and at most 1, for example 0.75"
    if not 0 <= c.data.rand_augment <= 10:
        yield f"data.rand_augment={c.data.rand_augment} must lie between 0 (none) and 10"


def _problems_of_data(c: ConfigDict) -> Iterator[str]:
    d = c.data
    if d.repeats < 1:
        yield f"data.repeats={d.repeats} must be at least 1"
    elif c.batch_size % d.repeats:
        yield f"batch_size={c.batch_size} is not divisible by data.repeats={d.repeats}"
    if d.cache is not None and d.cache < 1:
        yield f"data.cache={d.cache} must be a number of pixels, such as 256, or unset"
    if d.resize == "fast":
        # It decodes no more than one random crop needs, which is no gain where more is needed, or nothing is decoded.
        for key, value, plain in (
            ("crop", d.crop, "random_resized"), ("repeats", d.repeats, 1), ("cache", d.cache, None),
        ):  # fmt: skip
            if value != plain:
                yield f"data.resize=fast needs data.{key}={plain}, not {value}; use --config.data.resize=exact"


def _problems_of_sides(c: ConfigDict) -> Iterator[str]:
    sides, patch = c.data.sides, pair(c.model.patch)
    h, w = pair(c.image_size)
    if h != w or sides[-1] != h or list(sides) != sorted(set(sides)):
        yield f"data.sides={sides} must grow and end with image_size={c.image_size}, which must be square"
    for side in sides:
        if any(side < 1 or side % by for by in patch) or side * side <= patch[0] * patch[1]:
            yield f"data.sides={sides}: {side} is no multiple of model.patch={c.model.patch} with two patches or more"
    if c.model.positions != "fixed":
        yield f"data.sides needs model.positions=fixed, not {c.model.positions}, which are for one number of patches"
    if c.objective == "classify":
        yield "data.sides is for pretraining; unset it with a recipe that has none"


def _problems_of_finetuning(c: ConfigDict) -> Iterator[str]:
    f = c.finetune
    if f.pool == "cls" and not c.model.cls_token:
        yield "finetune.pool=cls needs model.cls_token=True; use --config.finetune.pool=mean"
    if c.model.mask_tokens:
        yield "model.mask_tokens is for pretraining; set --config.model.mask_tokens=false"
