"""Stopping when asked, all processes at the same step, and what else they must know of each other after each.

A hook is a function of `StepEnd`; the loop calls each after every step, in order.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from maejax.data.decode import CAUSES
from maejax.errors import Preempted
from maejax.ledger import GENESIS, LIMBS, Ledger, from_limbs, to_limbs
from maejax.processes import Sums
from maejax.signals import Interruption
from maejax.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What hooks are given. `step` counts finished steps, so the first one ends as step 1."""

    step: int
    state: TrainState
    metrics: dict[str, jax.Array]  # still on the device, maybe not computed yet
    data_wait: float  # seconds that the loop waited for this step's batch
    faults: Sequence[tuple[int, str]]  # (record, cause) of the images that could not be read
    records: np.ndarray | Sequence[int] = ()  # those of this process's rows
    consumed: int = 0  # their digest, for the ledger


class News:
    """What happened on any process: signals, images that could not be read, a save that failed; and what was read.

    With several processes it is known when the next step has been started, so that no step waits for it.
    """

    def __init__(
        self, interruption: Interruption, *, bad_images: dict[str, int], ledger: str = GENESIS,
        failing: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        self.stop = False  # whether a process was asked to
        self.save_failed = False  # whether all processes know that the save under way has failed
        self.bad_images = Counter(bad_images)  # by cause, of all steps so far; checkpoints carry it
        self.ledger = Ledger(ledger)  # so are all records
        self._interruption, self._failing = interruption, failing
        self._step = 0  # whose sums are under way
        self._sums = Sums(2 + LIMBS + len(CAUSES))

    def __call__(self, end: StepEnd) -> None:
        self._interruption.begun = True
        self.settle()
        causes = [cause for _, cause in end.faults]
        mine = [self._interruption.asked is not None, self._failing(), *to_limbs(end.consumed)]
        self._sums.add(np.array([*mine, *(causes.count(cause) for cause in CAUSES)], np.int32))
        self._step = end.step
        if jax.process_count() == 1:
            self.settle()

    def settle(self) -> None:
        """Waits for what is not known yet."""
        sums = self._sums.take()
        if sums is not None:
            stop, failing, *rest = sums
            self.stop |= bool(stop)
            self.save_failed = int(failing) == jax.process_count()
            self.ledger.add(self._step, from_limbs(rest[:LIMBS]))
            self.bad_images += Counter({cause: int(n) for cause, n in zip(CAUSES, rest[LIMBS:], strict=True)})


class EvaluationStopped(Preempted):
    """A process was asked to stop; all of them have left the evaluation at the same batch."""


class StopWhenAsked:
    """After an interruption of any process: saves and raises Preempted, at the same step on all."""

    def __init__(self, interruption: Interruption, news: News, save: Callable[[StepEnd], None]):
        self._interruption, self._news, self._save = interruption, news, save

    def __call__(self, end: StepEnd) -> None:
        if self._news.stop:
            self._save(end)
            raise Preempted(f"{cause(self._interruption)}: saved step {end.step}; the same command goes on from there")


def cause(interruption: Interruption) -> str:
    """Who asked this run to stop, for people."""
    return interruption.asked or "a signal to another process"
