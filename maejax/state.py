"""All that training changes, as one pytree; it is what a checkpoint holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maejax.guard import new_guard
from maejax.processes import fetch
from maejax.sharding import Preset, shard_tree
from maejax.tree import PyTree, named_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: int32 scalar, the number of finished steps. It is the whole state of the data stream, too.
    params: float32 parameters of the objective.
    opt_state: the optimizer's.
    ema: moving average of `params`, or {} if none is kept.
    stats: what an objective keeps beside its parameters, such as a batch norm's running mean; {} for most.
    guard: what the guard against ruinous steps remembers (see guard.py); {} where nothing is trained.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    stats: PyTree
    guard: PyTree = dataclasses.field(default_factory=dict)


def init_state(
    objective: nn.Module, tx: optax.GradientTransformation, example: Mapping[str, Any], *, seed: int, ema: bool
) -> TrainState:
    """The state before the first step. Pure and jittable: its parameters depend on `seed` alone, not on any device."""
    stats = dict(objective.init(jax.random.key(seed), example))
    params = stats.pop("params")
    average = jax.tree.map(jnp.array, params) if ema else {}  # copies: a donated state must not share buffers
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), ema=average, stats=stats,
        guard=new_guard(),
    )  # fmt: skip


def state_shardings(state: TrainState, preset: Preset, mesh: Mesh) -> TrainState:
    """Where every leaf of a state (of arrays or shapes) lies: moments and average with their parameters."""
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=shard_tree(state.params, preset.state, mesh),
        opt_state=shard_tree(state.opt_state, preset.state, mesh),
        ema=shard_tree(state.ema, preset.state, mesh),
        stats=shard_tree(state.stats, (), mesh),
        guard=shard_tree(state.guard, (), mesh),
    )


def not_finite(state: TrainState) -> list[str]:
    """The names of arrays in which a number is not finite; one pass over the state, on the devices."""
    leaves = {name: x for name, x in named_leaves(state).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = fetch(_all_finite(list(leaves.values())))
    return [name for name, good in zip(leaves, finite, strict=True) if not good]


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])
