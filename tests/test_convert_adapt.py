"""Resampling of positions, patches and channels, by hand, against scipy-free numpy and against Pillow."""

import numpy as np
import pytest
from PIL import Image

from maejax.convert.adapt import adapt_channels, antialiased_matrix, cubic_matrix, resample_patches, resample_positions


def test_cubic_by_hand():
    """Twice as many places: they lie a quarter to either side. Weights of Keys' kernel with a = -0.75 at 0.25."""
    matrix = cubic_matrix(8, 16)
    t, a = 0.25, -0.75

    def near(x):
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x):
        return a * (x**3 - 5 * x**2 + 8 * x - 4)

    by_hand = [far(1 + t), near(t), near(1 - t), far(2 - t)]  # place 7 is at 3.25: taps 2, 3, 4, 5
    np.testing.assert_allclose(matrix[7, 2:6], by_hand)
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_array_equal(cubic_matrix(5, 5), np.eye(5))


@pytest.mark.parametrize(("old", "new"), [(16, 9), (16, 31), (7, 14), (32, 8)])
def test_the_antialiased_resize_is_pillows(old, new):
    row = np.random.default_rng(0).standard_normal((1, old)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(row).resize((new, 1), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(row @ antialiased_matrix(old, new).T, theirs, atol=1e-5)


def test_positions_keep_the_class_row_and_planes():
    """Linear functions of the place are kept away from the edges, and the class token's row is never touched."""
    rows, columns = np.meshgrid(np.arange(8.0), np.arange(12.0), indexing="ij")
    plane = np.stack([rows, columns, rows + 2 * columns], axis=-1).reshape(1, -1, 3).astype(np.float32)
    table = np.concatenate([np.full((1, 1, 3), 7, np.float32), plane], axis=1)
    resampled = resample_positions(table, (8, 12), (16, 24), cls_token=True)
    assert resampled.shape == (1, 1 + 16 * 24, 3) and (resampled[:, 0] == 7).all()
    grid = resampled[0, 1:].reshape(16, 24, 3)[6, 10]  # at row (6.5 / 2 - 0.5), column (10.5 / 2 - 0.5)
    # Cubic convolution with a = -0.75 does not keep lines exactly, but within a tenth of a place.
    np.testing.assert_allclose(grid[:2], [2.75, 4.75], atol=0.1)
    np.testing.assert_array_equal(resample_positions(table, (8, 12), (8, 12), cls_token=True), table)
    with pytest.raises(ValueError, match="97 rows"):
        resample_positions(table, (8, 8), (4, 4), cls_token=True)


def test_larger_patches_give_the_same_tokens():
    """What FlexiViT's resize is made for: the enlarged patch's product is that of the patch."""
    rng = np.random.default_rng(0)
    kernel, patch = rng.standard_normal((6 * 4 * 3, 5)), rng.standard_normal((6, 4, 3))
    larger = resample_patches(kernel, (6, 4), (9, 10))
    enlarged = np.einsum("ij,kl,jlc->ikc", antialiased_matrix(6, 9), antialiased_matrix(4, 10), patch)
    np.testing.assert_allclose(enlarged.reshape(-1) @ larger, patch.reshape(-1) @ kernel, atol=1e-9)


def test_channels():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4 * 3, 5)).astype(np.float32)
    grey = rng.standard_normal(4).astype(np.float32)
    token = np.repeat(grey[:, None], 3, axis=1).reshape(-1) @ kernel
    np.testing.assert_allclose(grey @ adapt_channels(kernel, 3, 1), token, rtol=1e-5)
    six = adapt_channels(kernel, 3, 6)
    np.testing.assert_allclose(np.repeat(grey[:, None], 6, axis=1).reshape(-1) @ six, token, rtol=1e-5)
    np.testing.assert_array_equal(
        adapt_channels(kernel, 3, 5).reshape(4, 5, 5)[:, 3], kernel.reshape(4, 3, 5)[:, 0] * np.float32(0.6)
    )
    np.testing.assert_array_equal(adapt_channels(kernel, 3, 3), kernel)
