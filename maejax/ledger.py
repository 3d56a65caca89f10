"""The ledger of a run: a chain of digests that says which record was at which place of the stream, step by step.

Two runs that end with the same chain were given the same records in the same order; one that was duplicated or left
out, by a kill, a restart or a change of devices, gives another. Every checkpoint carries the chain up to its step, and
`expected_chain` computes it from the seed alone.

A step's digest is a sum over its rows, modulo 2^64, so it does not matter which process has which row. It is sent as
limbs of 16 bits, which int32 sums over processes cannot overflow.
"""

import hashlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from maejax.data.batches import RecordOrder
from maejax.mesh import process_share

GENESIS = "0" * 64  # before the first step
LIMBS = 4


class Ledger:
    """The chain up to the last step that was added."""

    def __init__(self, chain: str = GENESIS):
        self.chain = chain

    def add(self, step: int, digest: int) -> None:
        """One more finished step, and what `digest` says of its whole batch."""
        self.chain = hashlib.sha256(bytes.fromhex(self.chain) + f"{step} {digest:016x}".encode()).hexdigest()


def digest(positions: np.ndarray, records: np.ndarray) -> int:
    """Of some rows: the sum of a 64-bit hash of each row's place in the stream and its record, modulo 2^64."""
    with np.errstate(over="ignore"):
        rows = _mix(_mix(records.astype(np.uint64)) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return int(rows.sum(dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection that spreads every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_row(mesh: Mesh, batch_size: int) -> int | None:
    """Which row of a batch this process's first one is; None if another process has the same rows, and counts them."""
    shares = [process_share(mesh, process) for process in range(jax.process_count())]
    part, parts = shares[jax.process_index()]
    return None if (part, parts) in shares[: jax.process_index()] else part * (batch_size // parts)


def to_limbs(digest: int) -> list[int]:
    """A digest as 16-bit numbers, the lowest first."""
    return [digest >> 16 * limb & 0xFFFF for limb in range(LIMBS)]


def from_limbs(sums: Iterable[int]) -> int:
    """The sum of digests, modulo 2^64, from the sums of their limbs."""
    return sum(int(value) << 16 * limb for limb, value in enumerate(sums)) % 2**64


def expected_chain(
    *, num_examples: int, seed: int, batch_size: int, steps: int, repeats: int = 1,
    offset: Callable[[int], int] = lambda step: 0,
) -> str:  # fmt: skip
    """The chain of an undisturbed run after so many steps, from the order of the stream alone.

    `repeats`: places that one record takes. `offset(step)` is how many batches a step is ahead in the stream, where
    rollbacks have passed over some.
    """
    order, ledger = RecordOrder(num_examples, seed), Ledger()
    for step in range(steps):
        positions = (step + offset(step + 1)) * batch_size + np.arange(batch_size)
        ledger.add(step + 1, digest(positions, np.array([order[int(p) // repeats] for p in positions])))
    return ledger.chain
