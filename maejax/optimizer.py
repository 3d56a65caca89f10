"""AdamW with the paper's schedule and decay groups (paper, Table 8; official code for what is decayed)."""

from collections.abc import Callable

import jax.numpy as jnp
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


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: matrices and the class and mask tokens; not biases, not LayerNorms.

    The official code decays what has more than one dimension and is no bias. Names decide here, because the parameters
    of stacked blocks have one dimension more.
    """
    return map_named(lambda name, _: name.endswith(("kernel", "cls_token", "mask_token")), params)


def make_optimizer(
    schedule: Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """AdamW with decoupled decay in the groups of `decay_mask`, after clipping by the global norm if `clip_norm`."""
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
