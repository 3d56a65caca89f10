"""The order of records and the generators of places, against NumPy and Grain themselves."""

import grain
import numpy as np
import pytest

from maejax.data.batches import SMALL, Generators, RecordOrder, put, stream_seed


@pytest.mark.parametrize("num_examples", [SMALL, SMALL + 1, 50_000, 3_000_000_000])
def test_large_sets_are_in_grains_order(num_examples):
    order = RecordOrder(num_examples, seed=3)
    theirs = grain.MapDataset.range(num_examples).shuffle(seed=stream_seed(3)).repeat()
    for place in (0, 1, 17, num_examples - 1, num_examples, 2 * num_examples + 5):
        assert order[place] == theirs[place], place


@pytest.mark.parametrize("num_examples", [1, 2, 359, SMALL - 1])
def test_small_sets_are_permuted_anew_in_each_epoch(num_examples):
    order = RecordOrder(num_examples, seed=3)
    for epoch in range(3):
        expected = np.random.default_rng(stream_seed(3) + epoch).permutation(num_examples)
        assert [order[epoch * num_examples + i] for i in range(num_examples)] == expected.tolist()


def test_each_place_has_a_generator_of_its_own_wherever_one_begins():
    key, generators = np.random.Philox(7).state["state"]["key"], Generators(7)
    for place in (0, 1, 5, 2**40, 5):
        fresh = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, place]))
        rng = generators.at(place)
        assert rng.integers(2**31, dtype=np.int32) == fresh.integers(2**31, dtype=np.int32)  # leaves half a word over
        np.testing.assert_array_equal(rng.permutation(100), fresh.permutation(100))
        np.testing.assert_array_equal(rng.random(33), fresh.random(33))
    draws = [tuple(Generators(seed).at(place).random(4)) for seed in range(4) for place in range(500)]
    assert len(set(draws)) == 2000


@pytest.mark.parametrize("other", [{"image": np.zeros((1, 1, 3), np.uint8)}, {"label": np.zeros(2, np.int32)}])
def test_an_example_of_another_shape_is_not_spread_over_its_row(other):
    batch = {}
    example = {"image": np.ones((4, 4, 3), np.uint8), "label": np.int32(7)}
    put(example, batch, 0, 2)
    assert batch["label"].tolist()[:1] == [7] and batch["image"].shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match=f"{next(iter(other))} of row 1 has shape"):
        put(example | other, batch, 1, 2)
