"""The guard inside the jitted step: an update that would ruin the weights is not made, on any device.

A step is skipped when its loss or its gradient is not finite, or when the gradient's norm is many times what it has
been: parameters, moments, average, statistics and the optimizer's counters stay as they are, bit for bit, and the next
batch comes. The verdict is computed from the global loss and norm, so all devices and processes have the same one.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

# Accepted steps that the running mean of the norm looks back on. It judges nobody before it has seen as many.
HORIZON = 100


def new_guard() -> dict[str, Any]:
    """What the guard remembers, before the first step.

    int32 scalars: `skipped` steps of the run, and `in_a_row` those of them since the last accepted one; `measured`,
    how many norms are in the mean. float32: `log_norm`, the running mean of the logarithm of the gradient's norm; of
    the logarithm, so that one wild step among the first hundred does not blind it.
    """
    zero = jnp.zeros((), jnp.int32)
    return {"skipped": zero, "in_a_row": zero, "measured": zero, "log_norm": jnp.zeros((), jnp.float32)}


def judge(guard: dict[str, Any], loss: Array, norm: Array, *, spike: float) -> tuple[Array, dict[str, Any]]:
    """Whether a step's update may be made, a bool scalar; and what the guard remembers then.

    `norm` is the global norm of the float32 gradient. A finite one proves that every number of the gradient is finite,
    and its square too, which Adam's second moment adds up: a sum of squares with a NaN or an infinity in it is neither
    finite, nor is one that overflows. Norms over `spike` times their running mean are refused; 0: none are.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    accepted, log_norm = finite, jnp.log(norm)
    if spike:
        trusted = guard["measured"] >= HORIZON
        accepted &= ~(trusted & (log_norm > guard["log_norm"] + math.log(spike)))
    counts = accepted & (norm > 0)  # a gradient of zeros has no logarithm
    measured = guard["measured"] + counts
    moved = guard["log_norm"] + (log_norm - guard["log_norm"]) / jnp.clip(measured, 1, HORIZON)
    after = {
        "skipped": guard["skipped"] + ~accepted,
        "in_a_row": jnp.where(accepted, 0, guard["in_a_row"] + 1),
        "measured": measured,
        "log_norm": jnp.where(counts, moved, guard["log_norm"]),
    }
    return accepted, after
