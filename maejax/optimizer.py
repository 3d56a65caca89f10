"""AdamW and LARS, the paper's schedule, decay groups and layer-wise rates (paper, Tables 8 to 11; official code)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from maejax.tree import PyTree, map_named

Schedule = Callable[[Array | int], Array]


def make_schedule(*, base_lr: float, min_lr: float, batch_size: int, warmup_steps: int, total_steps: int) -> Schedule:
    """Learning rate by step: linear from 0 to the peak, then half a cosine down to `min_lr` at `total_steps`.

    The peak is `base_lr * batch_size / 256`. Step s, counted from 0, is updated with `schedule(s)`: the very first
    update of a warm-up has learning rate 0, as in the official code.
    """
    peak = base_lr * batch_size / 256

    def schedule(step: Array | int) -> Array:
        s = jnp.asarray(step, jnp.float32)
        after = jnp.clip((s - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        cosine = min_lr + (peak - min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * after))
        return jnp.where(s < warmup_steps, peak * s / max(warmup_steps, 1), cosine)

    return schedule


def decay_mask(params: PyTree, *, tokens: bool = True) -> PyTree:
    """True where weight decay applies: matrices, not biases, not LayerNorms.

    The official code decays what has more than one dimension and is no bias; names decide here, because the parameters
    of stacked blocks have one dimension more. So pretraining decays the class and mask tokens; fine-tuning does not
    (`tokens=False`), nor its position table.
    """
    decayed = ("kernel", "cls_token", "mask_token", "pos_embed") if tokens else ("kernel",)
    return map_named(lambda name, _: name.endswith(decayed), params)


def layer_scales(params: PyTree, *, depth: int, decay: float, trained: int | None) -> PyTree:
    """What every parameter's updates are multiplied by: layer-wise learning-rate decay, and 0 where nothing is trained.

    Layer 0 is the embedding with class token and positions, layer i + 1 block i, layer n = depth + 1 all that follows;
    layer i has decay**(n - i) (official code; Clark et al. 2020). With `trained` only so many last blocks have more
    than 0, and what follows them. Leaves are float32: scalars, and (l 1 ... 1) for stacked blocks.
    """
    layers = np.arange(depth + 2)
    scales = (decay ** (depth + 1.0 - layers)).astype(np.float32)
    if trained is not None:
        scales[: depth + 1 - trained] = 0

    def scale(name: str, leaf: Any) -> np.ndarray:
        if name.startswith("encoder/blocks/"):
            return scales[1:-1].reshape(-1, *[1] * (leaf.ndim - 1))
        if name.startswith("encoder/norm"):  # frozen features are taken behind it
            return scales[-1] * np.float32(trained != 0)
        return scales[0 if name.startswith("encoder/") else -1]

    return map_named(scale, params)


def make_optimizer(
    schedule: Schedule,
    *,
    name: str = "adamw",
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    decay_tokens: bool = True,
    scales: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """AdamW or LARS, after clipping by the global norm if `clip_norm`, with decoupled decay in the groups of
    `decay_mask`; updates are multiplied by `scales(params)`. What is frozen altogether has no moments.
    """
    mask = functools.partial(decay_mask, tokens=decay_tokens)
    if name == "lars":
        tx = lars(schedule, momentum=b1, weight_decay=weight_decay, mask=mask)
    else:
        tx = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    if clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    if scales is None:
        return tx

    def groups(params: PyTree) -> PyTree:
        return jax.tree.map(lambda scale: "trained" if scale.any() else "frozen", scales(params))

    def by_layer(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree.map(lambda u, scale: u * jnp.broadcast_to(scale, u.shape), updates, scales(updates))

    return optax.chain(
        optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, groups), optax.stateless(by_layer)
    )


def lars(
    schedule: Schedule, *, momentum: float, weight_decay: float, mask: Callable[[PyTree], PyTree], trust: float = 1e-3
) -> optax.GradientTransformation:
    """LARS (You et al. 2017) as MoCo v3 and the official linear probe have it.

    Matrices alone are decayed and scaled by trust * |parameter| / |gradient| (1 if either is 0). The learning rate is
    outside of the momentum; `optax.lars` has it inside and scales biases, too.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )
