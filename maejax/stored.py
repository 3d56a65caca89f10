"""What a checkpoint holds, read and written without a run: its arrays by name, the weights among them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from maejax.errors import NoValidCheckpoint, UsageError
from maejax.manifest import CorruptCheckpoint, read_meta, sealed_steps, verify, write_manifest
from maejax.state import TrainState
from maejax.tree import PyTree, named_leaves


def as_dict(state: TrainState) -> dict[str, Any]:
    """A state as checkpoints hold it: its parts by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def check_arrays(folder: Path, saved: PyTree, shapes: TrainState) -> None:
    """Raises UsageError for the first array that a checkpoint lacks, has too many, or with another shape or type."""
    there, wanted = named_leaves(saved), named_leaves(as_dict(shapes))
    for name in sorted(there.keys() | wanted.keys()):
        if name not in there or name not in wanted:
            problem = "is missing" if name in wanted else "has no place in this run"
        elif tuple(there[name].shape) != wanted[name].shape:
            problem = f"has shape {tuple(there[name].shape)}, expected {wanted[name].shape}"
        elif there[name].dtype != wanted[name].dtype:
            problem = f"is {there[name].dtype}, expected {wanted[name].dtype}"
        else:
            continue
        raise UsageError(
            f"{folder}: {name} {problem}; was the run started by another version? "
            f"--from={folder.parent.parent} takes its weights alone"
        )


def newest_verified(run: Path) -> Path:
    """The newest intact checkpoint of another run, which is left as it is."""
    run = run.absolute()
    steps = sealed_steps(run / "checkpoints")
    for step in reversed(steps):
        try:
            verify(folder := run / "checkpoints" / str(step))
            return folder
        except CorruptCheckpoint:
            continue
    if steps:
        raise NoValidCheckpoint(f"none of the checkpoints in {run / 'checkpoints'} is intact")
    raise UsageError(f"{run} has no checkpoint yet; expected a run's folder, with checkpoints/<step>/ in it")


def weight_shapes(checkpoint: Path, part: str = "params") -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's parameters by name, or of another part of the state."""
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(checkpoint).item_metadata.tree
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(saved.get(part) or {}).items()}


def load_weights(checkpoint: Path, shapes: PyTree, *, part: str = "params") -> PyTree:
    """The parameters in a checkpoint (their moving average, where one was kept), or another part of the state.

    `shapes` is the tree to fill, with shardings if it shall lie on a mesh; it may be a part of the saved one, such as
    {"encoder": ...}. Raises UsageError that names the first leaf that is missing or has another shape.
    """
    if not jax.tree.leaves(shapes):
        return shapes
    group = "ema" if part == "params" and weight_shapes(checkpoint, "ema") else part
    there = weight_shapes(checkpoint, group)
    with ocp.PyTreeCheckpointer() as reader:
        for name, leaf in named_leaves(shapes).items():
            if there.get(name) != leaf.shape:
                parts = {other.partition("/")[0] for other in there}
                if name.partition("/")[0] not in parts:
                    raise UsageError(f"{checkpoint} holds no {name.partition('/')[0]}, only {', '.join(sorted(parts))}")
                found = f"has shape {there[name]}" if name in there else "is missing"
                raise UsageError(f"{checkpoint}: {name} {found}, expected shape {leaf.shape}; are the models the same?")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), {group: shapes}
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        tree = reader.restore(checkpoint, args=args)
    return tree[group]


def save_sealed(folder: Path, state: TrainState, meta: dict[str, Any]) -> None:
    """Writes and seals one checkpoint of arrays on the host, at once and without a second copy of them."""
    folder = folder.absolute()
    tree = jax.tree.map(lambda x: jnp.from_dlpack(x) if x.ndim and x.flags.writeable else x, as_dict(state))
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(tree))
    write_manifest(folder, {"step": int(state.step), "meta": meta})


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint's weights came from before this project had them, as {"origin": ...}; {} if from nowhere."""
    meta = read_meta(checkpoint)
    return {"origin": meta["origin"]} if "origin" in meta else {}
