"""Classification: fine-tuning an encoder, a part of it, or a linear probe on it (paper, sections 4.1 to 4.3).

Which of these it is follows from the encoder's `trained`: everything, the last blocks, or (0) the head alone.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from maejax.models import ViT
from maejax.models.layers import layer_norm, normalize
from maejax.models.vit import pool


class Classifier(nn.Module):
    """The cross-entropy of a batch with `image` uint8 (b h w c) and `label` int32 (b), 0 .. num_classes - 1.

    With a generator "dropout" the batch is augmented: boxes `erase` int32 (b 4) are filled with noise, images and
    labels mixed. Without one nothing is random.
    """

    # Parameters that another run's weights need not have: they start anew.
    fresh: ClassVar[tuple[str, ...]] = ("head/", "fc_norm/", "encoder/pos_embed")

    encoder: ViT  # without its last norm where features are averaged: `fc_norm` follows the average instead
    num_classes: int
    pool: str = "mean"  # of the patch tokens; or "cls"
    batch_norm: bool = False  # normalise features over the batch, without affine parameters (the linear probe)
    head_std: float = 2e-5  # of the head's initial weights
    smoothing: float = 0.0  # of labels
    mixup: float = 0.0  # a of Beta(a, a); 0: none
    cutmix: float = 0.0

    def setup(self) -> None:
        """The head's parts; the encoder is given."""
        if self.pool == "mean":
            self.fc_norm = layer_norm(jnp.float32)
        if self.batch_norm:  # PyTorch's momentum of 0.1 is called 0.9 here
            self.bn = nn.BatchNorm(momentum=0.9, epsilon=1e-6, use_scale=False, use_bias=False)
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(self.head_std))

    def __call__(self, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The loss, a float32 scalar, and the share of images whose (greater) label is predicted."""
        images = normalize(batch["image"], self.encoder.mean, self.encoder.std)
        targets = smooth_labels(batch["label"], self.num_classes, self.smoothing)
        if self.has_rng("dropout"):
            if "erase" in batch:
                images = erase(self.make_rng("dropout"), images, batch["erase"])
            if self.mixup or self.cutmix:
                images, targets = mix(self.make_rng("dropout"), images, targets, mixup=self.mixup, cutmix=self.cutmix)
        logits = self.logits(images)
        right = logits.argmax(-1) == targets.argmax(-1)
        return optax.softmax_cross_entropy(logits, targets).mean(), {"top1": right.mean(dtype=jnp.float32)}

    def logits(self, images: Array) -> Array:
        """Unmasked images (b h w c) -> float32 (b k)."""
        x = pool(self.encoder(images), self.pool, self.encoder.cls_token).astype(jnp.float32)
        if self.pool == "mean":
            x = self.fc_norm(x)
        if self.batch_norm:
            x = self.bn(x, use_running_average=not self.is_mutable_collection("batch_stats"))
        return self.head(x)

    def features(self, images: Array) -> Array:
        """Tokens of the whole image (b [1+]n d), deterministic."""
        return self.encoder(images)


# ---- Augmentation of a batch ----------------------------------------------------------------------------------------
# On the devices, because a pair may lie on two hosts. What is drawn does not depend on how the batch is split.


def smooth_labels(labels: Array, num_classes: int, smoothing: float) -> Array:
    """int (b) -> float32 (b k): 1 - smoothing at the label, and smoothing / k everywhere on top."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def erase(key: Array, images: Array, boxes: Array) -> Array:
    """Fills a box (top, left, height, width) of every image with normal noise; a box of height 0 is none.

    Images are normalised, float32 (b h w c). Random erasing (Zhong et al. 2020), mode "pixel".
    """
    b, h, w, _ = images.shape
    top, left, height, width = (boxes[:, i, None] for i in range(4))
    rows, columns = jnp.arange(h)[None], jnp.arange(w)[None]
    inside_rows = (rows >= top) & (rows < top + height)  # b h
    inside_columns = (columns >= left) & (columns < left + width)  # b w
    inside = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
    return jnp.where(inside, jax.random.normal(key, images.shape), images)


def mix(key: Array, images: Array, targets: Array, *, mixup: float, cutmix: float) -> tuple[Array, Array]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself in reverse.

    One of the two, with even chances if both are on, and one ratio from Beta(a, a) for the whole batch, as timm's mode
    "batch" has it. images (b h w c), targets (b k).
    """
    which, ratio, place = jax.random.split(key, 3)
    cut = jax.random.bernoulli(which) if mixup and cutmix else jnp.asarray(cutmix > 0)
    a = jnp.where(cut, cutmix, mixup)
    lam = jax.random.beta(ratio, a, a)
    center = jax.random.uniform(place, (2,))
    blended = blend(images, targets, lam)
    pasted = paste(images, targets, lam, center)
    return jax.tree.map(lambda x, y: jnp.where(cut, x, y), pasted, blended)


def blend(images: Array, targets: Array, lam: Array | float) -> tuple[Array, Array]:
    """Mixup: lam of every image and target, 1 - lam of its partner's."""
    return images * lam + images[::-1] * (1 - lam), targets * lam + targets[::-1] * (1 - lam)


def paste(images: Array, targets: Array, lam: Array | float, center: Array) -> tuple[Array, Array]:
    """CutMix: a box of about 1 - lam of the area is the partner's; targets are weighted by the box's true area.

    `center` (2) in [0, 1) is where the box lies, as shares of height and width; it is cut at the borders.
    """
    h, w = images.shape[1:3]
    share = jnp.sqrt(1 - jnp.asarray(lam))
    sides = jnp.array([h, w])
    half = (sides * share).astype(jnp.int32) // 2
    middle = (center * sides).astype(jnp.int32)
    low, high = jnp.clip(middle - half, 0, sides), jnp.clip(middle + half, 0, sides)
    rows = (jnp.arange(h) >= low[0]) & (jnp.arange(h) < high[0])
    columns = (jnp.arange(w) >= low[1]) & (jnp.arange(w) < high[1])
    inside = (rows[:, None] & columns[None, :])[None, :, :, None]
    kept = 1 - (high - low).prod() / (h * w)
    return jnp.where(inside, images[::-1], images), targets * kept + targets[::-1] * (1 - kept)


def train_flops(
    *, patches: int, pixels: int, width: int, depth: int, mlp_ratio: float, cls_token: bool, trained: int | None
) -> float:
    """Floating-point operations (2 a multiply-add) that one image costs in one training step, without remat.

    Frozen blocks, below the `trained` last ones, have a forward pass only.
    """
    tokens = patches + int(cls_token)
    block = (8 + 4 * mlp_ratio) * tokens * width * width + 4 * tokens * tokens * width
    embed = 2 * patches * pixels * width
    backward = 2 * (depth if trained is None else trained) * block + (embed if trained is None else 0)
    return depth * block + embed + backward
