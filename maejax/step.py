"""One training step: gradient, update, metrics. Knows no model and no mask.

The step is written for one device; the shardings of its arguments make it run on a mesh.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from maejax.optimizer import Schedule
from maejax.state import TrainState
from maejax.tree import PyTree

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    objective: nn.Module,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    *,
    grad_accum_steps: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function `(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Metrics are float32 scalars: `train/loss` (of the parameters before the update), `train/grad_norm`, `train/lr` and
    what the objective reports.
    """

    def loss_and_grads(params: PyTree, batch: Batch) -> tuple[tuple[Array, Metrics], PyTree]:
        def loss(params: PyTree) -> tuple[Array, Metrics]:
            value, metrics = objective.apply({"params": params}, batch)
            return value, {"train/loss": value} | {f"train/{name}": metric for name, metric in metrics.items()}

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (value, metrics), grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if grad_accum_steps == 1:
            (_, metrics), grads = loss_and_grads(state.params, batch)
        else:
            metrics, grads = accumulate(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        metrics |= {"train/grad_norm": optax.tree.norm(grads), "train/lr": schedule(state.step)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def accumulate(params: PyTree, batch: Batch) -> tuple[Metrics, PyTree]:
        # Microbatch i takes rows i, i+a, i+2a, ...: with contiguous rows on each device, none has to move.
        micro = {key: jnp.swapaxes(x.reshape(-1, grad_accum_steps, *x.shape[1:]), 0, 1) for key, x in batch.items()}

        def body(total: tuple[Metrics, PyTree], part: Batch) -> tuple[tuple[Metrics, PyTree], None]:
            (_, metrics), grads = loss_and_grads(params, part)
            return jax.tree.map(jnp.add, total, (metrics, grads)), None

        first = {key: x[0] for key, x in micro.items()}
        (_, metrics), grads = jax.eval_shape(loss_and_grads, params, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, grads))
        total, _ = jax.lax.scan(body, zeros, micro)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    return train_step
