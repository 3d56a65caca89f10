"""One training step: gradient, update, metrics. Knows no model and no mask.

The step is written for one device; the shardings of its arguments make it run on a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from maejax.guard import judge
from maejax.optimizer import Schedule
from maejax.state import TrainState
from maejax.tree import PyTree

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Gradient = Callable[[PyTree, PyTree, Array, Batch], tuple[PyTree, Metrics, PyTree]]


def make_train_step(
    objective: nn.Module,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int = 0,
    grad_accum_steps: int = 1,
    ema_decay: float | None = None,
    spike: float = 0.0,
    gather: Callable[[PyTree], PyTree] = lambda params: params,
    scatter: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function `(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Metrics are float32 scalars: `train/loss` (of the parameters before the update), `train/grad_norm`, `train/lr` and
    what the objective reports; int32 ones are what the guard counts, `guard/skipped` and `guard/in_a_row`. An update
    that `guard.judge` refuses, by `spike` too, changes nothing but the step. What an objective draws at random, from
    its generator "dropout", depends on `seed` and the step alone: neither on devices nor on restarts. `gather` makes
    the copy of the parameters that the gradient is taken at, `scatter` brings a gradient to where the state lies.
    """
    gradient: Gradient = functools.partial(gradient_of, objective, scatter)
    if grad_accum_steps > 1:
        gradient = functools.partial(accumulated, gradient, grad_accum_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics, stats = gradient(gather(state.params), state.stats, key, batch)
        norm = optax.tree.norm(grads)
        accepted, guard = judge(state.guard, metrics["train/loss"], norm, spike=spike)

        def update(state: TrainState, grads: PyTree, stats: PyTree) -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema_decay is not None:
                ema = optax.incremental_update(params, ema, 1 - ema_decay)
            return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema, stats=stats)

        # Not a select on every leaf: that takes a tenth of a small step on CPUs, and room for another state.
        after = jax.lax.cond(accepted, update, lambda state, *_: state, state, grads, stats)
        # The optimizer counts accepted steps, and takes its rate by them.
        metrics |= {"train/grad_norm": norm, "train/lr": schedule(state.step - state.guard["skipped"])}
        metrics |= {f"guard/{name}": guard[name] for name in ("skipped", "in_a_row")}
        return dataclasses.replace(after, step=state.step + 1, guard=guard), metrics

    return train_step


def gradient_of(
    objective: nn.Module, scatter: Callable[[PyTree], PyTree], params: PyTree, stats: PyTree, key: Array, batch: Batch
) -> tuple[PyTree, Metrics, PyTree]:
    """The float32 gradient of an objective's loss, its metrics, and its statistics after this batch."""

    def loss(params: PyTree) -> tuple[Array, tuple[Metrics, PyTree]]:
        variables = {"params": params, **stats}
        (value, metrics), after = objective.apply(variables, batch, rngs={"dropout": key}, mutable=list(stats))
        named = {"train/loss": value} | {f"train/{name}": metric for name, metric in metrics.items()}
        return value, (named, after)

    grads, (metrics, after) = jax.grad(loss, has_aux=True)(params)
    grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), scatter(grads))  # a bfloat16 sum of them would drift
    return grads, metrics, after


def accumulated(
    gradient: Gradient, steps: int, params: PyTree, stats: PyTree, key: Array, batch: Batch
) -> tuple[PyTree, Metrics, PyTree]:
    """The mean of `gradient` and metrics over `steps` microbatches, which are computed in turn."""
    # Microbatch i takes rows i, i+a, i+2a, ...: with contiguous rows on each device, none has to move.
    micro = {name: jnp.swapaxes(x.reshape(-1, steps, *x.shape[1:]), 0, 1) for name, x in batch.items()}
    keys = jax.random.split(key, steps)

    def body(carry: tuple[PyTree, PyTree], part: tuple[Array, Batch]) -> tuple[tuple[PyTree, PyTree], None]:
        total, stats = carry
        *sums, stats = gradient(params, stats, *part)
        return (jax.tree.map(jnp.add, total, tuple(sums)), stats), None

    first = {name: x[0] for name, x in micro.items()}
    *shapes, _ = jax.eval_shape(gradient, params, stats, keys[0], first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(shapes))
    (total, stats), _ = jax.lax.scan(body, (zeros, stats), (keys, micro))
    grads, metrics = jax.tree.map(lambda x: x / steps, total)
    return grads, metrics, stats
