"""Going back after several skipped steps in a row, past the data that they saw; the same on every process, and exactly.

Step s of a run sees batch s + offset of the stream. The offset is 0 until a rollback: at step `at`, the last of several
that were skipped, the run returns to its checkpoint of step `to`, and step to + 1 sees what at + 1 would have seen.
`rollbacks.json` lists every rollback, and so do checkpoints. It is written before anything else is done, and which
batch a step sees is a function of it alone: a run may be killed at any moment, go on anywhere, and sees the same.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from maejax.checkpoint import Checkpoints
from maejax.errors import Diverged, StorageFailed
from maejax.manifest import CorruptCheckpoint, read_meta, sealed_steps
from maejax.processes import on_primary, share
from maejax.workdir import write_durably

Record = dict[str, int]  # at, to, offset
Result = TypeVar("Result")
FILE = "rollbacks.json"


class RollBack(Exception):
    """Asks for a rollback after `step`; raised at the same step on all processes."""

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step, self.reason = step, reason


def offset(records: Sequence[Record], step: int) -> int:
    """How many batches a step is ahead in the stream: by the newest rollback to a step before it."""
    return next((record["offset"] for record in reversed(records) if record["to"] < step), 0)


def segments(records: Sequence[Record], first: int, total: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, offset): steps start + 1 to stop, in order from `first` to `total`, with the same offset."""
    cuts = sorted({first, total, *(record["to"] for record in records if first < record["to"] < total)})
    for start, stop in zip(cuts, cuts[1:], strict=False):
        yield start, stop, offset(records, start + 1)


class Rollbacks:
    """The rollbacks of one run. `limit`: how many there may be; `in_a_row`: skipped steps that each is for."""

    def __init__(self, checkpoints: Checkpoints, *, limit: int, in_a_row: int, say: Callable[[str], None]):
        self._checkpoints, self._limit, self._in_a_row, self._say = checkpoints, limit, in_a_row, say
        self._file = checkpoints.folder.parent / FILE
        self.records: list[Record] = share(on_primary(self._load))
        on_primary(self._drop_abandoned)

    def _load(self) -> list[Record]:
        """The longest list that the file or a checkpoint has: copies of a run may lack the one or the other."""
        there = [self._meta(step) for step in sealed_steps(self._checkpoints.folder)]
        lists = [meta.get("rollbacks", []) for meta in there]
        if self._file.exists():
            lists.append(json.loads(self._file.read_text()))
        return max(lists, key=len, default=[])

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            return read_meta(self._checkpoints.folder / str(step))
        except CorruptCheckpoint:  # that is for `Checkpoints.newest` to say
            return {}

    def _drop_abandoned(self) -> None:
        """Deletes checkpoints of steps that a rollback undid."""
        for step in sealed_steps(self._checkpoints.folder) if self.records else []:
            undone = self.records[len(self._meta(step).get("rollbacks", [])) :]
            if any(step > record["to"] for record in undone):
                self._checkpoints.discard(step)

    def until_done(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, made again after every rollback that it asks for."""
        while True:
            try:
                return attempt()
            except RollBack as back:
                self._go_back(back)

    def _go_back(self, back: RollBack) -> None:
        """Notes a rollback and clears its way; raises Diverged if there were too many."""
        self._checkpoints.wait()
        if len(self.records) >= self._limit:
            raise Diverged(
                f"{back.reason} at step {back.step}, and {self._in_a_row} steps in a row were skipped, after "
                f"{len(self.records)} rollbacks (guard.max_rollbacks={self._limit}); the last checkpoint is intact: "
                "start from it with --from and a smaller base_lr, a longer warmup or optimizer.clip_norm=1"
            )
        record: Record = share(on_primary(lambda: self._note(back)))
        self.records = [*self.records, record]
        self._say(
            f"step {back.step}: {self._in_a_row} steps in a row were skipped; going back to step {record['to']}, with "
            f"the data that follows (rollback {len(self.records)} of {self._limit})"
        )
        on_primary(self._drop_abandoned)

    def _note(self, back: RollBack) -> Record:
        there = sealed_steps(self._checkpoints.folder)
        # One that was saved among the skipped steps is as good as the state before them, but nothing older may be left.
        to = max([step for step in there if step <= back.step - self._in_a_row] or there, default=0)
        record = {"at": back.step, "to": to, "offset": back.step + offset(self.records, back.step) - to}
        try:
            write_durably(self._file, json.dumps([*self.records, record], indent=1) + "\n")
        except OSError as error:
            raise StorageFailed(f"{self._file} could not be written: {error.strerror}") from error
        return record
