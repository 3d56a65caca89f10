"""Every sampler, by the same table: exact counts, each patch once, its own randomness and nothing else."""

import numpy as np
import pytest

from maejax.data.masking import SAMPLERS, as_indices, masks_for, num_visible

CASES = [
    ((14, 14), 49),
    ((16, 16), 64),
    ((4, 4), 1),
    ((4, 4), 15),
    ((5, 3), 7),
    ((16, 8), 32),
    ((14, 14), 98),
    ((1, 2), 1),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid, visible", CASES)
def test_every_sampler(sampler, grid, visible):
    n = grid[0] * grid[1]
    for seed in range(20):
        drawn = SAMPLERS[sampler](np.random.default_rng(seed), grid, visible)
        shown, hidden = as_indices(drawn)
        assert shown.dtype == hidden.dtype == np.int32
        assert len(shown) == visible and len(hidden) == n - visible
        assert (np.diff(shown) > 0).all() and (np.diff(hidden) > 0).all()
        assert sorted([*shown, *hidden]) == list(range(n))
        again = SAMPLERS[sampler](np.random.default_rng(seed), grid, visible)
        np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_get_masks_of_their_own(sampler):
    visible, masked = masks_for(16, grid=(14, 14), num_visible=49, sampler=sampler, seed=0)
    assert visible.shape == (16, 49) and masked.shape == (16, 147)
    assert len({tuple(row) for row in visible}) > (1 if sampler == "grid" else 10)


@pytest.mark.parametrize(
    "n, ratio, expected",
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (100, 0.9, 10),
        (196, 0.6, 78),
        (196, 0.8, 39),
        (64, 0.999, 1),
        (64, 0.001, 63),
        (4, 0.5, 2),
    ],
)
def test_number_of_visible_patches(n, ratio, expected):
    assert num_visible(n, ratio) == expected


def test_random_is_uniform():
    visible, _ = masks_for(4000, grid=(4, 4), num_visible=4, sampler="random", seed=1)
    counts = np.bincount(visible.reshape(-1), minlength=16)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)  # five standard deviations


def test_grid_at_three_quarters_keeps_one_of_every_four():
    visible, _ = masks_for(50, grid=(14, 14), num_visible=49, sampler="grid", seed=0)
    for row in visible:
        shown = np.zeros((14, 14), int)
        shown.reshape(-1)[row] = 1
        cells = shown.reshape(7, 2, 7, 2).sum(axis=(1, 3))
        assert (cells == 1).all()
        assert len({(r % 2, c % 2) for r, c in zip(*np.nonzero(shown), strict=True)}) == 1  # a lattice
    assert len(np.unique(visible)) == 196  # over many images every position is shown


def test_blocks_hang_together():
    # Hidden patches have far more hidden neighbors than under a random mask, where three quarters of them are.
    def neighbors(sampler):
        _, masked = masks_for(50, grid=(14, 14), num_visible=98, sampler=sampler, seed=0)
        share = []
        for row in masked:
            hidden = np.zeros((14, 14), bool)
            hidden.reshape(-1)[row] = True
            share.append((hidden[:, 1:] & hidden[:, :-1]).sum() / hidden[:, :-1].sum())
        return np.mean(share)

    assert neighbors("random") == pytest.approx(0.5, abs=0.05)
    assert neighbors("block") > 0.75
