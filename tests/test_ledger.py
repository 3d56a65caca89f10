"""The ledger: it tells any other order of records, and nothing else."""

import hashlib

import numpy as np
import pytest

from maejax import build
from maejax import config as configs
from maejax.data.batches import RecordOrder
from maejax.data.transforms import records_of
from maejax.interruption import Interruption, News, StepEnd
from maejax.ledger import GENESIS, Ledger, digest, expected_chain, first_row, from_limbs, to_limbs
from maejax.mesh import make_mesh
from maejax.overrides import override


def test_the_digest_does_not_depend_on_who_has_which_row():
    places, records = np.arange(32), np.random.default_rng(0).integers(0, 1000, 32)
    whole = digest(places, records)
    for parts in (2, 4, 8):
        split = [digest(p, r) for p, r in zip(np.split(places, parts), np.split(records, parts), strict=True)]
        assert sum(split) % 2**64 == whole
        assert from_limbs(np.sum([to_limbs(part) for part in split], axis=0, dtype=np.int32)) == whole
    order = np.random.default_rng(1).permutation(32)
    assert digest(places[order], records[order]) == whole


def test_any_other_record_or_place_changes_it():
    places, records = np.arange(16), np.arange(16) * 7
    seen = {digest(places, records)}
    for row in range(16):
        for other in (records[row] + 1, records[(row + 1) % 16]):  # one that is new, one that comes twice
            changed = records.copy()
            changed[row] = other
            seen.add(digest(places, changed))
    swapped = records.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    seen |= {digest(places, swapped), digest(places + 16, records), digest(places[:-1], records[:-1])}
    assert len(seen) == 1 + 32 + 3


def test_limbs_hold_what_many_processes_add():
    assert from_limbs(to_limbs(2**64 - 1)) == 2**64 - 1
    sums = np.sum([to_limbs(2**64 - 1)] * 30_000, axis=0, dtype=np.int32)
    assert sums.min() > 0 and from_limbs(sums) == 30_000 * (2**64 - 1) % 2**64


def test_the_chain_is_sha256_over_steps_and_digests():
    ledger, expected = Ledger(), bytes(32)
    for step, value in ((1, 5), (2, 2**63)):
        ledger.add(step, value)
        expected = hashlib.sha256(expected + f"{step} {value:016x}".encode()).digest()
    assert ledger.chain == expected.hex() and Ledger().chain == GENESIS


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_the_order_that_the_ledger_expects(workers):
    """Two epochs of the real batches; the first steps by themselves, the others as a resumed run reads them."""
    config = override(configs.load("pretrain_digits"), {"batch_size": "256", "data.workers": str(workers), "seed": "5"})
    source, ledger, size = build.source_of(config), Ledger(), config.batch_size
    mesh = make_mesh(config.mesh)
    assert first_row(mesh, size) == 0
    total, cut = 11, 4
    seen = []
    for first, last in ((0, cut), (cut, total)):
        batches = build.training_batches(config, source, mesh, first_step=first)
        for step in range(first, last):
            rows = next(batches)
            seen.extend(rows["index"])
            records = records_of(rows["index"], rows["faults"])
            ledger.add(step + 1, digest(step * size + np.arange(size), records))
        batches.close() if hasattr(batches, "close") else None
    assert sorted(seen[: len(source)]) == list(range(len(source)))  # each once in the first epoch
    assert ledger.chain == expected_chain(num_examples=len(source), seed=5, batch_size=size, steps=total)
    assert ledger.chain != expected_chain(num_examples=len(source), seed=6, batch_size=size, steps=total)
    assert [RecordOrder(len(source), 5)[p] for p in range(100)] == seen[:100]


def test_a_record_that_cannot_be_read_keeps_its_place_in_the_ledger():
    index, faults = np.array([3, 9, 4]), np.full((3, 4), -1)
    faults[1, :2] = 7 * 16 + 1, 8 * 16  # 7 and then 8 could not be read, so 9 took their place
    assert records_of(index, faults).tolist() == [3, 7, 4]


def test_news_keep_it_for_checkpoints():
    news = News(Interruption(), bad_images={}, ledger="ab" * 32)
    expected = Ledger("ab" * 32)
    for step in (5, 6):
        value = digest(np.arange(step), np.arange(step))
        news(StepEnd(step=step, state=None, metrics={}, data_wait=0.0, faults=[], consumed=value))
        expected.add(step, value)
    assert news.ledger.chain == expected.chain
