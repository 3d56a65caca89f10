"""Checkpoints that prove themselves: Orbax writes them asynchronously, a manifest with every file's digest seals them.

    checkpoints/<step>/...            Orbax's files
    checkpoints/<step>/manifest.json  written last; without it the checkpoint does not exist
    checkpoints/rejected-<step>/      a checkpoint that did not verify, with reason.txt

Orbax commits atomically but keeps no digest of array values: of 60 single flipped bits, 60 were restored without an
error. So each file is hashed after the commit, in a thread of its own, and verified before anything is restored.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from maejax.errors import NoValidCheckpoint, StorageFailed, UsageError
from maejax.guard import new_guard
from maejax.processes import all_true, is_primary, on_primary, share
from maejax.state import TrainState
from maejax.tree import PyTree, named_leaves

MANIFEST = "manifest.json"
FORMAT = 1
Say = Callable[[str], None]


class CorruptCheckpoint(Exception):
    """A checkpoint's files are not those that were written; the message says which and how."""


class Checkpoints:
    """The checkpoints of one run, which alone writes to `folder`."""

    def __init__(self, folder: Path, *, keep: int, say: Say):
        self.folder = folder = folder.absolute()  # Orbax insists
        self._keep = keep
        self._say = say
        self._failures = 0  # saves that failed in a row
        self._pending: Future[None] | None = None  # the save under way
        self._step: int | None = None  # the last one that was saved or restored
        self._thread = ThreadPoolExecutor(1, "seal")
        self._orbax = ocp.StandardCheckpointer()
        on_primary(self._clear)

    def _clear(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():  # by a run that was killed while it saved
            if left.is_dir() and not left.name.startswith("rejected-") and not (left / MANIFEST).exists():
                shutil.rmtree(left)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to write a checkpoint of the state's step; returns when the state has left the device.

        `meta` is JSON that goes into the manifest. Training goes on if a save fails; StorageFailed is raised when two
        in a row have.
        """
        step = int(state.step)
        if step == self._step:
            return
        self.wait()
        try:
            self._orbax.save(self.folder / str(step), _as_dict(state), force=True)
        except Exception as error:  # whatever the storage raises: OSError, ValueError of TensorStore, ...
            self._failed(error)
        else:
            self._step = step
            self._pending = self._thread.submit(self._seal, step, meta)

    def _seal(self, step: int, meta: dict[str, Any]) -> None:
        # In a thread of its own: waits for Orbax's writer, hashes what it wrote, and only then lets go of older ones.
        self._orbax.wait_until_finished()
        if not is_primary():
            return
        write_manifest(self.folder / str(step), {"format": FORMAT, "step": step, "meta": meta})
        for old in sealed_steps(self.folder)[: -self._keep]:
            shutil.rmtree(self.folder / str(old))

    def wait(self) -> None:
        """Returns when the save under way, if any, is sealed or has failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is None and not all_true(True):
            error = OSError("another process could not write its part")
        elif error is not None:
            all_true(False)
        if error is None:
            self._failures = 0
        else:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._failures += 1
        self._step = None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self._failures >= 2:
            raise StorageFailed(
                f"two checkpoints in a row could not be written to {self.folder}: {reason}; free some space or check "
                "the disk, then run the same command again"
            ) from error
        self._say(f"warning: a checkpoint could not be written ({reason}); going on")

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and meta of the newest checkpoint that verifies, on all processes; None if there has never been one.

        Those that do not verify are set aside and reported. Raises NoValidCheckpoint if no other is left.
        """
        found = share(on_primary(self._newest))
        return None if found is None else (int(found[0]), found[1])

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        steps = sealed_steps(self.folder)
        for step in reversed(steps):
            try:
                return step, verify(self.folder / str(step))["meta"]
            except CorruptCheckpoint as error:
                aside = self.folder / f"rejected-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
                (aside / "reason.txt").write_text(f"{error}\n")
                self._say(f"checkpoint {step} is damaged: {error}; set aside as {aside.name}")
        if steps or any(self.folder.glob("rejected-*")):
            raise NoValidCheckpoint(
                f"none of the checkpoints in {self.folder} is intact (see rejected-*/reason.txt); to begin again, "
                "choose another --workdir or delete this one"
            )
        return None

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """The state of a step; `shapes` carry shardings, which may differ from those it was saved with."""
        self._step = step
        wanted = _as_dict(shapes)
        guard: PyTree = {}
        if not weight_shapes(self.folder / str(step), "guard"):  # it was saved before there was a guard
            where = jax.tree.map(lambda leaf: leaf.sharding, wanted.pop("guard"))
            guard = jax.jit(new_guard, out_shardings=where)()
        return TrainState(**{"guard": guard} | self._orbax.restore(self.folder / str(step), wanted))

    def discard(self, step: int) -> None:
        """Deletes a checkpoint that shall never be used; for process 0."""
        (self.folder / str(step) / MANIFEST).unlink()  # first: half of one is none
        shutil.rmtree(self.folder / str(step))

    def close(self) -> None:
        """Waits for this process's part of the save under way; `wait` before, to know that it is sealed."""
        self._thread.shutdown()
        self._orbax.close()


def sealed_steps(folder: Path) -> list[int]:
    """The steps that have a sealed checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit() and (f / MANIFEST).exists())


# ---- Manifests ------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `folder/manifest.json` with `content` and the digest of every file; atomic and durable."""
    files = {str(f.relative_to(folder)): digest(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    body = json.dumps({**content, "files": files}, indent=1).encode()
    draft = folder / f"{MANIFEST}.draft"
    with draft.open("wb") as out:
        out.write(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
    draft.rename(folder / MANIFEST)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def verify(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest, if that and all files are as written; raises CorruptCheckpoint."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{MANIFEST}: {error.strerror}") from error
    body, _, seal = raw[:-1].rpartition(b"\n")
    if raw[-1:] != b"\n" or hashlib.sha256(body).hexdigest().encode() != seal:
        raise CorruptCheckpoint(f"{MANIFEST} was changed after it was written")
    content = json.loads(body)
    if content["format"] != FORMAT:
        raise UsageError(f"{folder} has checkpoint format {content['format']}; this maejax reads format {FORMAT}")
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    for name in sorted(there ^ set(content["files"])):
        raise CorruptCheckpoint(f"{name} is {'not in the manifest' if name in there else 'missing'}")
    for name, expected in content["files"].items():
        if digest(folder / name) != expected:
            raise CorruptCheckpoint(f"{name} was changed after it was written")
    return content


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Weights of a run -----------------------------------------------------------------------------------------------


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


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def save_sealed(folder: Path, state: TrainState, meta: dict[str, Any]) -> None:
    """Writes and seals one checkpoint of arrays on the host, at once and without a second copy of them."""
    folder = folder.absolute()
    tree = jax.tree.map(lambda x: jnp.from_dlpack(x) if x.ndim and x.flags.writeable else x, _as_dict(state))
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(tree))
    write_manifest(folder, {"format": FORMAT, "step": int(state.step), "meta": meta})


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint's weights came from before this project had them, as {"origin": ...}; {} if from nowhere."""
    meta = meta_of(checkpoint)
    return {"origin": meta["origin"]} if "origin" in meta else {}


def meta_of(checkpoint: Path) -> dict[str, Any]:
    """What was saved as a checkpoint's meta, unverified; {} if its manifest cannot be read."""
    try:
        return json.loads((checkpoint / MANIFEST).read_bytes()[:-1].rpartition(b"\n")[0])["meta"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def say_nothing(_: str) -> None:
    """For processes that do not report."""
