"""What a run begins with: its own newest checkpoint, another run's weights, or new ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from maejax import build
from maejax.checkpoint import Checkpoints
from maejax.convert import adapt
from maejax.convert.weights import fixed_table
from maejax.data.sources import Source
from maejax.errors import UsageError
from maejax.state import TrainState
from maejax.stored import load_weights, newest_verified, origin_of, weight_shapes
from maejax.tree import PyTree, named_leaves, nest
from maejax.workdir import stored_config

Say = Callable[[str], None]
# What may stay behind when another kind of network starts from these weights.
LEFT_BEHIND = ("decoder/", "head/", "fc_norm/", "encoder/norm/", "encoder/mask_token")


def starting_state(
    checkpoints: Checkpoints,
    source: Source,
    init: Callable[[], TrainState],
    shapes: TrainState,
    objective: nn.Module,
    *,
    config: ConfigDict,
    start_from: Path | None,
    adapt_weights: bool,
    say: Say,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what its checkpoint says: the newest intact one, else --from, else new weights."""
    found = checkpoints.newest()
    if found:
        step, meta = found
        say(f"resuming at step {step}")
        return checkpoints.restore(step, shapes), meta
    state, origin = init(), dict[str, Any]()
    if start_from:
        origin = origin_of(newest_verified(start_from))  # a licence travels with weights
        weights = weights_from(
            start_from, shapes.params, state.params, objective, config if adapt_weights else None, say=say
        )
        # The average, if there is one, starts from the same weights; a copy, because both are donated.
        where = jax.tree.map(lambda x: x.sharding, state.ema or weights)
        ema = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=where)(weights) if state.ema else {}
        state = dataclasses.replace(state, params=weights, ema=ema)
    return state, {"data": source.fingerprint(), "bad_images": {}} | origin


def weights_from(
    run: Path, shapes: PyTree, new: PyTree, objective: nn.Module, adapt_to: ConfigDict | None = None, *, say: Say
) -> PyTree:
    """A run's newest weights in the tree of `shapes`; what an objective may start anew is taken from `new`.

    Every array is accounted for: what is missing, of another shape or left over without a reason is a UsageError that
    names it. With `adapt_to`, a config, patches, channels and positions are fitted to its images, and a head for other
    classes starts anew.
    """
    checkpoint = newest_verified(run)
    there, wanted = weight_shapes(checkpoint), named_leaves(shapes)
    adapted = _adapted(run, checkpoint, wanted, adapt_to) if adapt_to else {}
    fresh: tuple[str, ...] = getattr(objective, "fresh", ())
    if not any(name.startswith("decoder/") for name in there):
        fresh = (*fresh, "decoder/")  # an encoder that came alone, from elsewhere
    begun = [name for name in wanted if name not in there and name not in adapted and name.startswith(fresh)]
    for name in wanted:
        if _is_head(name) and name in there and there[name] != wanted[name].shape:
            if adapt_to is None:
                raise UsageError(
                    f"the head of {run} is for {there[name][-1]} classes, the images have {wanted[name].shape[-1]}; "
                    "--adapt starts a new head"
                )
            begun.append(name)
    left = [name for name in there if name not in wanted and not name.startswith(LEFT_BEHIND)]
    if left:
        raise UsageError(f"{run} has {left[0]}, for which this network has no place; are the models the same?")
    as_saved = {name: leaf for name, leaf in wanted.items() if name not in begun and name not in adapted}
    taken = named_leaves(load_weights(checkpoint, nest(as_saved))) | adapted
    say(
        f"starting from the weights of {run}: {len(taken)} of {len(wanted)} arrays{_listed('adapted', list(adapted))}"
        f"{_listed('new', begun)}"
    )
    return nest(named_leaves(new) | taken)


def _adapted(run: Path, checkpoint: Path, wanted: dict[str, Any], c: ConfigDict) -> dict[str, jax.Array]:
    """The encoder's first arrays for images of another size, other patches or channels; those that need it."""
    config = stored_config(run)
    assert config is not None
    before, after = build.shapes_of(config), build.shapes_of(c)
    there, found = weight_shapes(checkpoint), {}

    def saved(name: str) -> np.ndarray:
        shapes = {name: jax.ShapeDtypeStruct(there[name], np.float32)}
        return np.asarray(named_leaves(load_weights(checkpoint, nest(shapes)))[name])

    kernel, table = "encoder/embed/kernel", "encoder/pos_embed"
    if (before.channels, before.patch) != (after.channels, after.patch):
        channels = adapt.adapt_channels(saved(kernel), before.channels, after.channels)
        found[kernel] = adapt.resample_patches(channels, before.patch, after.patch)
    if before.grid != after.grid and table in wanted:
        cls = config.model.cls_token
        old = saved(table) if table in there else fixed_table(before.grid, wanted[table].shape[-1], cls)
        found[table] = adapt.resample_positions(old, before.grid, after.grid, cls_token=cls)
    return {name: jax.device_put(value, wanted[name].sharding) for name, value in found.items()}


def _is_head(name: str) -> bool:
    return name.startswith("head/")


def _listed(what: str, names: list[str]) -> str:
    tops = sorted({name if name.startswith("encoder/") else name.partition("/")[0] for name in names})
    return f"; {what}: {', '.join(tops)}" if tops else ""


def check_same_shape(run: Path, before: ConfigDict, now: ConfigDict) -> None:
    """Raises UsageError if images differ in size or channels from those of the run that weights come from."""
    for key, old, new in (
        ("image_size", before.image_size, now.image_size),
        ("model.patch", before.model.patch, now.model.patch),
        ("data.channels", before.data.channels, now.data.channels),
    ):
        if old != new:
            raise UsageError(
                f"{run} was trained with {key}={_short(old)}, this config has {_short(new)}; --adapt (of maejax "
                f"finetune) fits the weights to it, --config.{key}={_short(old)} keeps them"
            )


def _short(value: Any) -> str:
    return ",".join(str(number) for number in value) if isinstance(value, tuple) else str(value)
