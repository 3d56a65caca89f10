"""What a config computes on a mesh: the network, the state's shapes and shardings, and the jitted step.

It needs no data and no accelerator: `maejax plan` compiles the very same program for hardware that is not there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from maejax import build
from maejax.mesh import batch_sharding, check_batch, whole
from maejax.sharding import PRESETS, layer_copy, with_shardings, working_copy
from maejax.state import TrainState, init_state, state_shardings
from maejax.step import make_train_step

# By platform, for several devices. On TPUs XLA would otherwise compute a matrix's gradient in as many narrow slices as
# there are devices, each sent on while the next is computed: at 32 devices a slice of ViT-L is 32 columns wide, a
# quarter of a matrix unit, and sums are rounded to bfloat16 at every hop. With it there is one reduce-scatter. On GPUs
# gradients are to be sent while others are computed, as NVIDIA's own images of JAX ask for; not tried on one here.
COMPILER_OPTIONS: dict[str, Any] = {
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Attributes:
    objective: the Flax module that is trained.
    total_steps: the length of the run.
    shapes: a TrainState of ShapeDtypeStructs with their shardings.
    new_state: jitted `() -> TrainState`, before the first step.
    train_step: jitted `(state, batch) -> (state, metrics)`; donates the state.
    batch: ShapeDtypeStructs, with their shardings, of a whole batch.
    """

    objective: nn.Module
    total_steps: int
    shapes: TrainState
    new_state: Any
    train_step: Any
    batch: dict[str, jax.ShapeDtypeStruct]


def make_program(c: ConfigDict, mesh: Mesh, *, num_examples: int, num_classes: int | None) -> Program:
    """The program of a run over `num_examples` images; `num_classes`: None if they have no labels.

    Raises:
      UsageError: the batch or the network cannot be split over the mesh as asked.
    """
    check_batch(c.batch_size, mesh, c.grad_accum_steps)
    preset, dtype = PRESETS[c.sharding], jnp.dtype(c.dtype)
    gather = functools.partial(layer_copy, preset=preset, mesh=mesh, dtype=dtype) if preset.layer else None
    platform = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform  # of none: plain forms
    # TPU's kernels know nothing of heads on several devices.
    objective = build.make_objective(c, gather, "" if platform == "tpu" and mesh.shape["tensor"] > 1 else platform)
    tx, schedule, total_steps = build.optimization(c, num_examples)
    example = build.example_batch(c, num_classes)
    ema = c.optimizer.ema_decay
    init = functools.partial(init_state, objective, tx, example, seed=c.seed, ema=ema is not None)
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, preset, mesh)
    step = make_train_step(
        objective, tx, schedule, seed=c.seed, grad_accum_steps=c.grad_accum_steps, ema_decay=ema,
        # A classifier's gradient is small where it knows the answer: that of a hard image is no accident.
        spike=0 if build.classifies(c) else c.guard.spike,
        gather=functools.partial(working_copy, preset=preset, mesh=mesh, dtype=dtype),
        scatter=lambda grads: jax.lax.with_sharding_constraint(grads, shardings.params),
    )  # fmt: skip
    train_step = jax.jit(
        step if platform != "tpu" else _in_context(mesh, step), donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, whole(mesh)),
        compiler_options=COMPILER_OPTIONS.get(platform) if mesh.size > 1 else None,
    )  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((c.batch_size, *rows.shape[1:]), rows.dtype, sharding=batch_sharding(mesh))
        for name, rows in example.items()
    }
    return Program(
        objective=objective, total_steps=total_steps, shapes=with_shardings(shapes, shardings),
        new_state=jax.jit(init, out_shardings=shardings), train_step=train_step, batch=batch,
    )  # fmt: skip


def _in_context(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, traced with the mesh as its context, by which kernels are given each device's own rows."""

    def train_step(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return train_step
