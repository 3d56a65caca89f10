"""Pictures: right pixels in right places, and no hidden pixel in a reconstruction."""

import numpy as np
from PIL import Image

from maejax.visualize import grid, nearby_statistics, reconstruct, to_images, to_patches

PATCH = (4, 4)


def example(b=2, h=8, w=12, c=3, v=2):
    rng = np.random.default_rng(0)
    n = (h // 4) * (w // 4)
    order = np.stack([rng.permutation(n) for _ in range(b)])
    images = rng.integers(0, 256, (b, h, w, c), dtype=np.uint8)
    return images, np.sort(order[:, :v]), np.sort(order[:, v:])


def test_patches_and_back():
    images, _, _ = example()
    patches = to_patches(images, PATCH)
    np.testing.assert_array_equal(patches[1, 4].reshape(4, 4, 3), images[1, 4:8, 4:8])
    np.testing.assert_array_equal(to_images(patches, PATCH, (8, 12)), images)


def reconstruction(images, visible, masked, predicted, **kwargs):
    options = {"patch": PATCH, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "norm_pix": True} | kwargs
    return reconstruct(images, visible, masked, predicted, **options)


def test_a_perfect_prediction_gives_the_original_back():
    images, visible, masked = example()
    pixels = to_patches((images / 255 - np.float32([0.4, 0.5, 0.6])) / np.float32([0.2, 0.3, 0.4]), PATCH)
    true = np.take_along_axis(pixels, masked[:, :, None], 1)
    raw = reconstruction(images, visible, masked, true, norm_pix=False)
    np.testing.assert_array_equal(raw["reconstruction"], images)
    normalized = (true - true.mean(-1, keepdims=True)) / np.sqrt(true.var(-1, keepdims=True, ddof=1) + 1e-6)
    columns = reconstruction(images, visible, masked, normalized)
    np.testing.assert_array_equal(columns["uses the true patch's mean and std"], images)
    assert list(columns) == ["original", "masked", "reconstruction", "uses the true patch's mean and std"]


def test_hidden_pixels_leak_into_no_column_but_the_labelled_one():
    images, visible, masked = example()
    predicted = np.random.default_rng(1).normal(size=(2, 4, 48)).astype(np.float32)
    changed = to_patches(images, PATCH)
    for row in range(2):
        changed[row, masked[row]] = 255 - changed[row, masked[row]] // 3
    before = reconstruction(images, visible, masked, predicted)
    after = reconstruction(to_images(changed, PATCH, (8, 12)), visible, masked, predicted)
    for title in ("masked", "reconstruction"):
        np.testing.assert_array_equal(before[title], after[title])
    title = "uses the true patch's mean and std"
    assert (before[title] != after[title]).any()


def test_visible_patches_are_shown_as_they_are():
    images, visible, masked = example()
    columns = reconstruction(images, visible, masked, np.zeros((2, 4, 48), np.float32))
    for title in columns:
        patches = to_patches(columns[title], PATCH)
        for row in range(2):
            np.testing.assert_array_equal(patches[row, visible[row]], to_patches(images, PATCH)[row, visible[row]])


def test_statistics_come_from_the_nearest_by_inverse_square():
    patches = np.zeros((1, 4, 4), np.float32)  # one row of four patches
    patches[0, 0], patches[0, 3] = 1.0, 5.0
    mean, _ = nearby_statistics(patches, np.array([[0, 3]]), np.array([[1, 2]]), columns=4)
    # Patch 1 is 1 from the first and 2 from the last: weights 1 and 1/4.
    np.testing.assert_allclose(mean[0, :, 0], [(1 + 5 / 4) / 1.25, (1 / 4 + 5) / 1.25], rtol=1e-6)


def test_grid_has_one_row_an_image_and_titles():
    images, visible, masked = example(b=3)
    columns = reconstruction(images, visible, masked, np.zeros((3, 4, 48), np.float32))
    sheet = grid(columns, caption="step 5", shortest=40)
    assert isinstance(sheet, Image.Image) and sheet.width == 4 * (60 + 4) + 4
    tile = np.asarray(sheet)[-3 * 44 :, :][0:40, 4:64]
    np.testing.assert_array_equal(tile[::5, ::5][:8, :12], images[0])
    grey = grid({"original": np.full((1, 8, 8, 1), 7, np.uint8)}, shortest=8)
    assert (np.asarray(grey)[-10, 6] == 7).all()
