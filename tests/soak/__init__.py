"""Campaigns: faults by the hundred, against the promises of docs/reliability.md.

    PYTHONPATH=tests python -m soak            # all of them, from seed 0
    PYTHONPATH=tests python -m soak --rows=2,16 --seconds=600 --seed=7
    PYTHONPATH=tests python -m soak --write              # docs/reliability.md from the results

Each module here holds campaigns of one kind. A campaign is a function of a `Trial` that breaks something and asserts
what was promised; it may return numbers worth publishing. Trials count from 0 and depend on the seed and their number
alone, so one that failed can be run again: --rows=2 --first=17 --trials=1.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Trial:
    """Attributes:
    number: from 0.
    rng: the trial's own.
    folder: empty, deleted after a trial that held.
    """

    number: int
    rng: random.Random
    folder: Path


Function = Callable[[Trial], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Campaign:
    """Attributes:
    row: of the fault matrix, which docs/reliability.md shows; several campaigns may share one.
    name: the function's.
    fault, promise: in a few words each, for the matrix.
    trials: how many the promise is held for.
    fast: the test of `make test` that holds a part of it on every commit, such as test_resume.py; "" if none.
    """

    row: int
    name: str
    fault: str
    promise: str
    trials: int
    fast: str
    function: Function


CAMPAIGNS: list[Campaign] = []


def campaign(*, row: int, fault: str, promise: str, trials: int, fast: str = "") -> Callable[[Function], Function]:
    """Registers a function of a Trial."""

    def register(function: Function) -> Function:
        assert function.__name__ not in {c.name for c in CAMPAIGNS}, "results are kept by name"
        CAMPAIGNS.append(
            Campaign(
                row=row, name=function.__name__, fault=fault, promise=promise, trials=trials, fast=fast,
                function=function,
            )
        )  # fmt: skip
        return function

    return register
