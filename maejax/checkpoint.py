"""Checkpoints that prove themselves: Orbax writes them asynchronously, a manifest with every file's digest seals them.

    checkpoints/<step>/...            Orbax's files
    checkpoints/<step>/manifest.json  written last; without it the checkpoint does not exist
    checkpoints/rejected-<step>/      a checkpoint that did not verify, with reason.txt
    checkpoints/debug-<step>/         a state that was not finite, with reason.txt; never resumed from
    .newest                           the step that was sealed or verified last: with it, no run begins anew silently

Orbax commits atomically but keeps no digest of array values: of 60 single flipped bits, 60 were restored without an
error. So each file is hashed after the commit, in a thread of its own, and verified before anything is restored.

Processes agree on every save beside the loop: what fails on one of them has failed on all, and is told on all at the
same step.
"""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from maejax.agreement import Agreement
from maejax.errors import Diverged, NoValidCheckpoint, StorageFailed, reason_of
from maejax.faults import fault_point
from maejax.manifest import MANIFEST, CorruptCheckpoint, sealed_steps, verify, write_manifest
from maejax.processes import all_true, is_primary, on_primary, share
from maejax.state import TrainState, not_finite
from maejax.stored import as_dict, check_arrays

NEWEST = ".newest"
KEPT = ("rejected-", "debug-")  # for people to look at
PATIENCE = 2.0  # seconds that a periodic save waits for the one before; it is left out then
LONGEST = 600  # seconds that a process waits for the others while a checkpoint is written
Say = Callable[[str], None]

_saves = itertools.count()  # of this process; the same on all


class Checkpoints:
    """The checkpoints of one run, which alone writes to `folder`."""

    def __init__(self, folder: Path, *, keep: int, say: Say):
        self.folder = folder = folder.absolute()  # Orbax insists
        self._keep = keep
        self._say = say
        self._failures = 0  # saves that failed in a row
        self._pending: futures.Future[str] | None = None  # the save under way
        self._step: int | None = None  # the last one that was saved or restored
        self._agreement = Agreement("")
        self._thread = futures.ThreadPoolExecutor(1, "seal")
        everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
        self._orbax = ocp.StandardCheckpointer(
            async_options=ocp.options.AsyncOptions(
                timeout_secs=LONGEST, barrier_sync_fn=self._meet,
                post_finalization_callback=lambda: fault_point("save.commit"),
            ),
            # Named, all processes meet through the coordination service, with a time limit; else through a collective
            # that has none.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everyone),
        )  # fmt: skip
        on_primary(self._clean)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        self._agreement.reach(seconds=timeout_ms / 1000)

    # ---- Saving -----------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, meta: dict[str, Any], *, wait: bool = False) -> None:
        """Starts to write a checkpoint of the state's step; returns when the state has left the device.

        `meta` is JSON that goes into the manifest. Training goes on if a save fails, and if the one before is still
        being written after PATIENCE (with `wait`: however long it takes).

        Raises:
          StorageFailed: two saves in a row have failed.
          Diverged: a number in the state is not finite; the state is kept for study, not to be resumed from.
        """
        step = int(state.step)
        if step == self._step:
            return
        if not self.wait(None if wait else PATIENCE):
            self._say(f"warning: storage is slow, the last checkpoint is still being written; none of step {step}")
            return
        fault_point("save.begin")
        if broken := not_finite(state):
            self._keep_for_study(state, f"{broken[0]} is not finite at step {step} ({len(broken)} arrays are not)")
        if problem := share(on_primary(lambda: self._prepare(str(step)))):
            self._failed(problem)
            return
        self._step = step
        self._pending = self._start(state, str(step), functools.partial(self._seal, step, meta))

    def _keep_for_study(self, state: TrainState, reason: str) -> None:
        name = f"debug-{int(state.step)}"
        if not share(on_primary(lambda: self._prepare("debug-*"))):
            self._start(state, name, lambda: _write_reason(self.folder / name, reason)).exception()
        raise Diverged(f"{reason}; kept as {self.folder / name}, and the last checkpoint is intact")

    def _prepare(self, pattern: str) -> str | None:
        """Makes room for a checkpoint; the problem, if none can be written: here it is known to all processes."""
        try:
            fault_point("save.prepare")
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"?")
        except (OSError, RuntimeError) as error:
            return reason_of(error)
        return None

    def _start(self, state: TrainState, name: str, then: Callable[[], str]) -> futures.Future[str]:
        self._agreement, error = Agreement(f"save/{next(_saves)}"), None
        try:
            fault_point("save.copy")
            self._orbax.save(self.folder / name, as_dict(state), force=True)
            fault_point("save.copied")
        except Exception as raised:  # whatever the storage raises: OSError, ValueError of TensorStore, ...
            error = raised
        return self._thread.submit(self._finish, self._agreement, then, error)

    def _finish(self, agreement: Agreement, then: Callable[[], str], error: Exception | None) -> str:
        # In a thread of its own: waits for Orbax's writers, of all processes, and then hashes what they wrote.
        with agreement.stage():
            try:
                fault_point("save.write")
                if error is not None:
                    raise error
            finally:
                self._orbax.wait_until_finished()
            fault_point("save.committed")
        with agreement.stage():
            note = then() if is_primary() else ""
        return note

    def _seal(self, step: int, meta: dict[str, Any]) -> str:
        write_manifest(self.folder / str(step), {"step": step, "meta": meta})
        self._note(step)
        for old in sealed_steps(self.folder)[: -self._keep]:
            try:
                fault_point("retain")
                (self.folder / str(old)).rename(gone := self.folder / f"deleted-{old}")
                fault_point("retain.renamed")
                shutil.rmtree(gone)
            except OSError as error:  # the new one is safe
                return f"warning: checkpoint {old} could not be deleted ({reason_of(error)})"
        return ""

    def failing(self) -> bool:
        """Whether the save under way has failed on this process; the others learn of it, and then `wait` tells."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Returns when the save under way, if any, is sealed or has failed; False if not after so many seconds.

        Raises:
          StorageFailed: it has failed, as the one before it has.
        """
        if self._pending is None:
            return True
        futures.wait([self._pending], seconds)
        if not all_true(self._pending.done()):
            return False
        pending, self._pending = self._pending, None
        error = pending.exception()
        if not all_true(error is None):
            self._failed("another process has failed" if error is None else reason_of(error))
            return True
        self._failures = 0
        if is_primary():
            self._agreement.forget()
        if note := pending.result():
            self._say(note)
        return True

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._step = None
        if is_primary():
            with suppress(OSError):
                self._clean()  # what was written of it takes space
        if self._failures >= 2:
            raise StorageFailed(
                f"two checkpoints in a row could not be written to {self.folder}: {reason}; free some space or check "
                "the disk, then run the same command again"
            )
        self._say(f"warning: a checkpoint could not be written ({reason}); going on")

    def close(self) -> None:
        """Waits for this process's part of the save under way; `wait` before, to know that it is sealed."""
        self._thread.shutdown()
        self._orbax.close()

    # ---- Restoring --------------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Removes what a run left that was killed while it saved; sets aside what has lost its manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self._noted()
        for left in sorted(self.folder.iterdir()):
            kept = left.name.startswith(KEPT) and "." not in left.name  # Orbax's drafts have an ending
            sealed = left.name.isdigit() and (left / MANIFEST).exists()
            if kept or sealed or not left.is_dir():
                continue
            fault_point("clean")
            if left.name.isdigit() and int(left.name) <= newest:
                self._set_aside(int(left.name), f"{MANIFEST} is missing")
            else:
                left.unlink() if left.is_symlink() else shutil.rmtree(left)

    def _note(self, step: int) -> None:
        draft = self.folder.parent / f"{NEWEST}.draft"
        draft.write_text(f"{step}\n")
        draft.rename(self.folder.parent / NEWEST)

    def _noted(self) -> int:
        try:
            return int((self.folder.parent / NEWEST).read_text())
        except (OSError, ValueError):
            return -1

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and meta of the newest checkpoint that verifies, on all processes; None if there has never been one.

        Those that do not verify are set aside and reported. Raises NoValidCheckpoint if no other is left.
        """
        found = share(on_primary(self._newest))
        return None if found is None else (int(found[0]), found[1])

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        for step in reversed(sealed_steps(self.folder)):
            try:
                meta = verify(self.folder / str(step))["meta"]
            except CorruptCheckpoint as error:
                self._set_aside(step, str(error))
            else:
                self._note(step)  # what has no manifest and comes after it is a draft
                return step, meta
        if self._noted() >= 0 or any(self.folder.glob("rejected-*")):
            raise NoValidCheckpoint(
                f"none of the checkpoints in {self.folder} is intact (see rejected-*/reason.txt) or there; to begin "
                "again, choose another --workdir or delete this one"
            )
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        folder, aside = self.folder / str(step), self.folder / f"rejected-{step}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            _write_reason(folder, reason)  # first: it makes the folder no better
            fault_point("reject")
            folder.rename(aside)
            done = f"set aside as {aside.name}"
        except OSError as error:
            done = f"it cannot be set aside ({reason_of(error)})"
        self._say(f"checkpoint {step} is damaged: {reason}; {done}")

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """The state of a step; `shapes` carry shardings, which may differ from those it was saved with.

        Raises:
          UsageError: the checkpoint holds other arrays; says which.
          StorageFailed: it verified, and cannot be read now.
        """
        fault_point("restore.begin")
        folder = self.folder / str(step)
        check_arrays(folder, self._orbax.metadata(folder).item_metadata.tree, shapes)
        try:
            state = TrainState(**self._orbax.restore(folder, as_dict(shapes)))
        except (OSError, ValueError) as error:
            raise StorageFailed(f"{folder} cannot be read: {reason_of(error)}; check the disk and run again") from error
        fault_point("restore.done")
        self._step = step
        return state


def _write_reason(folder: Path, reason: str) -> str:
    (folder / "reason.txt").write_text(f"{reason}\n")
    return ""
