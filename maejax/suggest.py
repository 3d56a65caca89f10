"""What to run when the user has given nothing but images: sizes, batch and schedule, each with its reason."""

import copy

from ml_collections import ConfigDict

from maejax import config as configs


def suggest(*, source: str, num_images: int, median_side: int, platform: str, num_devices: int) -> ConfigDict:
    """A config for `num_images` images whose shorter side is `median_side` pixels in the median.

    `platform` is JAX's name of the backend: "cpu" gets a model that a laptop can train.
    """
    c = configs.default()
    c.data.source = source
    small = median_side < 64
    c.image_size, c.model.patch = ((32,), (4,)) if small else ((96,), (8,)) if median_side < 160 else ((224,), (16,))
    if platform == "cpu":
        c.model.size, c.decoder.width, c.decoder.depth, c.decoder.heads = "Ti", 192, 4, 6
        per_device, examples = 64 // num_devices or 1, 50_000
    else:
        c.model.size, c.dtype = "B", "bfloat16"
        per_device, examples = 256, 20_000_000
    # A small folder gets a batch that is at most a quarter of it, a power of two on every device.
    while per_device > 1 and per_device * num_devices > max(num_images // 4, 8):
        per_device //= 2
    c.batch_size = per_device * num_devices
    # As many passes as the budget of examples allows, within what is useful: the paper runs 800 on 1.3 M images.
    c.total_epochs = float(min(max(round(examples / num_images), 10), 800))
    c.log_steps = 20 if platform != "cpu" else 10
    return c.lock()


def with_warmup(c: ConfigDict, num_images: int) -> ConfigDict:
    """`c` with a twentieth of its length as warm-up (the paper's 40 of 800 epochs), unless it has one already."""
    if all(c[f"warmup_{unit}"] is None for unit in ("steps", "epochs", "examples")):
        c.warmup_steps = configs.steps(c, "total", num_images) // 20
    return c


def reasons(c: ConfigDict, *, num_images: int, median_side: int, platform: str) -> list[str]:
    """The choices above, a line each, for people."""
    h, w = configs.pair(c.image_size)
    p, q = configs.pair(c.model.patch)
    total, warmup = (configs.steps(c, name, num_images) for name in ("total", "warmup"))
    why = "for training on CPU" if platform == "cpu" else f"for {platform}"
    return [
        f"chose images of {h}x{w} in patches of {p}x{q} (the median image's shorter side is {median_side})",
        f"chose ViT-{c.model.size} with a decoder of {c.decoder.depth} x {c.decoder.width}, {c.dtype} ({why})",
        f"chose batches of {c.batch_size}, {total * c.batch_size / num_images:.3g} passes over {num_images:,} images: "
        f"{total:,} steps, {warmup:,} of them warm-up",
        "change any of these with --config.KEY=VALUE; see maejax pretrain --help",
    ]


# ---- Fine-tuning ----------------------------------------------------------------------------------------------------

ENCODER_KEYS = ("size", "width", "depth", "heads", "mlp_ratio", "cls_token", "positions")


def with_encoder_of(c: ConfigDict, before: ConfigDict, *, adapt: bool = False) -> ConfigDict:
    """A recipe with the encoder of the run that it starts from; `adapt` leaves it its patches and channels."""
    c = copy.deepcopy(c).unlock()
    for key in ENCODER_KEYS:
        if key != "positions" or before.model.positions == "learned":  # a recipe may make fixed positions learned
            c.model[key] = before.model[key]
    if not adapt:
        c.model.patch = before.model.patch
        for key in ("channels", "mean", "std"):
            c.data[key] = before.data[key]
    return c.lock()


def finetuning(before: ConfigDict) -> ConfigDict:
    """The paper's end-to-end fine-tuning (Table 9) on the images of a pretraining run."""
    c = configs.from_dict(configs.to_dict(before)).unlock()
    c.objective = "classify"
    c.finetune = configs.default().finetune
    for name in configs.DURATIONS:
        for unit in ("steps", "epochs", "examples"):
            c[f"{name}_{unit}"] = None
    c.total_epochs, c.warmup_epochs, c.eval_epochs, c.save_epochs = 50.0, 5.0, 5.0, 5.0
    c.base_lr, c.min_lr = 1e-3, 1e-6
    c.optimizer.b2, c.optimizer.layer_decay, c.optimizer.ema_decay = 0.999, 0.75, None
    c.model.mask_tokens, c.model.positions, c.model.drop_path = False, "learned", 0.1
    c.finetune.smoothing, c.finetune.mixup, c.finetune.cutmix = 0.1, 0.8, 1.0
    c.data.rand_augment, c.data.erasing, c.data.eval_crop = 9.0, 0.25, 0.875
    c.evals = "accuracy"
    return c.lock()
