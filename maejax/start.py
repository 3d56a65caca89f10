"""What a run begins with: its own newest checkpoint, another run's weights, or new ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from maejax.checkpoint import Checkpoints, load_weights, newest_verified, origin_of, weight_shapes
from maejax.data.sources import Source
from maejax.errors import UsageError
from maejax.state import TrainState
from maejax.tree import PyTree, named_leaves, nest

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
    start_from: Path | None,
    adapt: bool,
    say: Say,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what its checkpoint says: the newest intact one, else --from, else new weights."""
    found = checkpoints.newest()
    if found:
        step, meta = found
        if meta["data"] != source.fingerprint():
            run = checkpoints.folder.parent
            raise UsageError(
                f"the images are not those that {run} was started with; restore them, or start a new --workdir with "
                f"--from={run}"
            )
        say(f"resuming at step {step}")
        return checkpoints.restore(step, shapes), meta
    state, origin = init(), dict[str, Any]()
    if start_from:
        origin = origin_of(newest_verified(start_from))  # a licence travels with weights
        weights = weights_from(start_from, shapes.params, state.params, objective, adapt=adapt, say=say)
        # The average, if there is one, starts from the same weights; a copy, because both are donated.
        ema = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), weights, state.ema or weights)
        state = dataclasses.replace(state, params=weights, ema=ema if state.ema else {})
    return state, {"data": source.fingerprint(), "bad_images": {}} | origin


def weights_from(
    run: Path, shapes: PyTree, new: PyTree, objective: nn.Module, *, adapt: bool = False, say: Say
) -> PyTree:
    """A run's newest weights in the tree of `shapes`; what an objective may start anew is taken from `new`.

    Every array is accounted for: what is missing, of another shape or left over without a reason is a UsageError that
    names it. With `adapt` a head for other classes starts anew.
    """
    checkpoint = newest_verified(run)
    there, wanted = weight_shapes(checkpoint), named_leaves(shapes)
    fresh: tuple[str, ...] = getattr(objective, "fresh", ())
    if not any(name.startswith("decoder/") for name in there):
        fresh = (*fresh, "decoder/")  # an encoder that came alone, from elsewhere
    begun = [name for name in wanted if name not in there and name.startswith(fresh)]
    if adapt:
        begun += [name for name in wanted if name in there and there[name] != wanted[name].shape and _is_head(name)]
    for name in wanted:
        if _is_head(name) and name in there and name not in begun and there[name] != wanted[name].shape:
            raise UsageError(
                f"the head of {run} is for {there[name][-1]} classes, the images have {wanted[name].shape[-1]}; "
                "--adapt starts a new head"
            )
    left = [name for name in there if name not in wanted and not name.startswith(LEFT_BEHIND)]
    if left:
        raise UsageError(f"{run} has {left[0]}, for which this network has no place; are the models the same?")
    taken = load_weights(checkpoint, nest({name: leaf for name, leaf in wanted.items() if name not in begun}))
    say(f"starting from the weights of {run}: {len(wanted) - len(begun)} of {len(wanted)} arrays{_listed(begun)}")
    return nest(named_leaves(new) | named_leaves(taken))


def _is_head(name: str) -> bool:
    return name.startswith("head/")


def _listed(names: list[str]) -> str:
    tops = sorted({name if name.startswith("encoder/") else name.partition("/")[0] for name in names})
    return f"; new: {', '.join(tops)}" if tops else ""


def check_same_shape(run: Path, before: ConfigDict, now: ConfigDict) -> None:
    """Raises UsageError if images differ in size or channels from those of the run that weights come from."""
    for key, old, new in (
        ("image_size", before.image_size, now.image_size),
        ("model.patch", before.model.patch, now.model.patch),
        ("data.channels", before.data.channels, now.data.channels),
    ):
        if old != new:
            raise UsageError(
                f"{run} was trained with {key}={_short(old)}, this config has {_short(new)}; --adapt fits the weights "
                f"to it, --config.{key}={_short(old)} keeps them"
            )


def _short(value: Any) -> str:
    return ",".join(str(number) for number in value) if isinstance(value, tuple) else str(value)
