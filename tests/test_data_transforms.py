"""Crops and colors against torchvision's algorithm worked out again, and against Pillow called directly."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from maejax.data.decode import BadImage
from maejax.data.randaugment import rand_augment
from maejax.data.transforms import (
    CROPS,
    Augment,
    LoadImage,
    center,
    color_jitter,
    copy_pixels,
    cover,
    crop_resize,
    fixed,
    random_box,
    read_faults,
    resize,
    shrink,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def assert_near(got, expected):
    """As good as Pillow's bits: see test_data_resize, where that is held on photographs and on noise."""
    assert got.shape == expected.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).mean() <= 1


def image(h=50, w=70, c=3):
    return np.random.default_rng(h * w).integers(0, 256, (h, w, c), dtype=np.uint8)


def test_crop_gives_the_pixels_of_torchvision_on_pillow():
    # torchvision: img.crop((left, top, left + w, top + h)).resize(size, BICUBIC)
    array, box = image(), (5, 11, 30, 41)
    expected = Image.fromarray(array).crop((11, 5, 52, 35)).resize((24, 16), Image.Resampling.BICUBIC)
    assert_near(crop_resize(array, box, (16, 24)), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels_are_resized_alone(channels):
    array = image(c=channels)
    got = resize(array, (16, 24))
    for c in range(channels):
        plane = Image.fromarray(array[..., c]).resize((24, 16), Image.Resampling.BICUBIC)
        assert_near(got[..., c], np.asarray(plane))


def torchvision_box(height, width, rng):
    """RandomResizedCrop.get_params as its documentation and paper describe it, from the same draws."""
    for _ in range(10):
        target = height * width * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = int(round(math.sqrt(target * aspect))), int(round(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = rng.integers(0, height - h + 1)
            return top, rng.integers(0, width - w + 1), h, w
    if width / height < RATIO[0]:
        w, h = width, int(round(width / RATIO[0]))
    elif width / height > RATIO[1]:
        w, h = int(round(height * RATIO[1])), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(50, 70), (375, 500), (1, 1), (10, 400), (400, 10), (3, 5)])
def test_boxes_are_torchvisions(height, width):
    for seed in range(50):
        box = random_box(height, width, np.random.default_rng(seed), scale=SCALE, ratio=RATIO)
        assert box == torchvision_box(height, width, np.random.default_rng(seed))
        top, left, h, w = box
        assert 0 <= top and 0 <= left and top + h <= height and left + w <= width


def test_boxes_cover_the_allowed_areas_and_ratios():
    boxes = [random_box(400, 400, np.random.default_rng(s), scale=SCALE, ratio=RATIO) for s in range(2000)]
    areas = np.array([h * w / 160_000 for _, _, h, w in boxes])
    ratios = np.array([w / h for _, _, h, w in boxes])
    assert areas.min() < 0.22 and 0.19 < areas.min() and areas.max() > 0.95
    assert ratios.min() == pytest.approx(0.75, abs=0.02) and ratios.max() == pytest.approx(4 / 3, abs=0.02)
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)  # log-uniform, not uniform


def test_center_crop():
    array = image(60, 100)
    # Covers 30 x 30 as 30 x 50, of which columns 10 to 40 are the center.
    expected = np.asarray(Image.fromarray(array).resize((50, 30), Image.Resampling.BICUBIC))[:, 10:40]
    assert_near(center(array, None, size=(30, 30)), expected)
    assert center(image(7, 300), None, size=(32, 16)).shape == (32, 16, 3)


def test_fixed_crop_is_a_part_of_the_image_at_256_for_224():
    array = image(300, 400)
    whole = np.asarray(Image.fromarray(array).resize((341, 256), Image.Resampling.BICUBIC))
    got = fixed(array, np.random.default_rng(0), size=(224, 224))
    draws = np.random.default_rng(0)
    top, left = int(draws.integers(256 - 224 + 1)), int(draws.integers(341 - 224 + 1))
    assert_near(got, whole[top : top + 224, left : left + 224])


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_every_crop_gives_its_size(crop, size):
    for shape in ((50, 70), (5, 3), (1, 90)):
        got = CROPS[crop](image(*shape), np.random.default_rng(0), size=size, scale=SCALE, ratio=RATIO)
        assert got.shape == (*size, 3) and got.dtype == np.uint8


def test_a_very_long_image_does_not_take_memory_without_bound():
    # One row of 20,000 pixels would cover 224 x 224 as 224 x 4,480,000: three gigabytes, to keep 224 of its columns.
    array = image(1, 20_000)
    assert cover(array, (224, 224)).size <= 3 * 224 * 224 * 16
    # The middle stays the middle: 4 gradients, of which the center is where the second meets the third.
    ramp = np.repeat(np.arange(4, dtype=np.uint8) * 60, 5000)[None, :, None].repeat(3, 2)
    got = center(ramp, None, size=(8, 8))
    assert got.shape == (8, 8, 3) and set(np.unique(got)) <= set(range(55, 126))
    panorama = image(10, 150)  # within the bound nothing changes
    expected = np.asarray(Image.fromarray(panorama).resize((300, 20), Image.Resampling.BICUBIC))
    assert_near(cover(panorama, (20, 20)), expected)


def test_what_is_small_enough_is_not_shrunk():
    small = image(30, 90)
    assert shrink(small, 30) is small
    assert shrink(small, 20).shape == (20, 60, 3) and shrink(small.transpose(1, 0, 2), 20).shape == (60, 20, 3)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_are_copied_whichever_way_they_run(channels):
    view = image(c=channels)[:, 3:40]
    for turned in (view, view[:, ::-1], view[::-1], view[::-1, ::-1], view[::2, ::-2]):
        target = np.zeros(turned.shape, np.uint8)
        copy_pixels(turned, target)
        np.testing.assert_array_equal(target, turned)


@pytest.mark.parametrize("jitter, magnitude", [(0.4, 0.0), (0.0, 9.0), (0.4, 9.0)])
def test_colors_change_after_crop_and_flip(jitter, magnitude):
    """In that order and from one generator; the flip by Pillow."""
    flips, changed = set(), 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        box = random_box(40, 60, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
        expected = crop_resize(image(40, 60), box, (16, 12))
        flips.add(flip := rng.random() < 0.5)
        if flip:
            expected = np.asarray(Image.fromarray(expected).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        plain = expected
        if jitter:
            expected = color_jitter(expected, rng, jitter)
        if magnitude:
            expected = rand_augment(expected, rng, magnitude=magnitude, fill=(1, 2, 3))
        augment = Augment(size=(16, 12), color_jitter=jitter, rand_augment=magnitude, fill=(1, 2, 3))
        got = augment({"image": image(40, 60)}, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(got, expected)
        changed += (expected != plain).any()
    assert flips == {True, False} and changed > 6  # an operation may leave an image as it is


def test_cover_never_undershoots():
    for h, w in ((33, 77), (77, 33), (2, 3)):
        got = cover(image(h, w), (16, 20)).shape
        assert got[0] >= 16 and got[1] >= 20 and (got[0] == 16 or got[1] == 20)


def test_color_jitter_of_strength_zero_changes_hardly_anything():
    array = image()
    changed = color_jitter(array, np.random.default_rng(0), 0.0).astype(int)
    assert np.abs(changed - array).max() <= 12  # HSV in eight bits loses a little
    strong = color_jitter(array, np.random.default_rng(0), 0.4).astype(int)
    assert np.abs(strong - array).mean() > 5


def test_color_jitter_draws_in_the_order_it_applies():
    array, rng = image(), np.random.default_rng(3)
    picture = Image.fromarray(array)
    for change in rng.permutation(4):
        if change == 3:
            h, s, v = (np.asarray(band) for band in picture.convert("HSV").split())
            shift = int(rng.uniform(-0.4, 0.4) / 4 * 255)  # torchvision: np.int32(hue_factor * 255)
            turned = ((h.astype(int) + shift) % 256).astype(np.uint8)
            picture = Image.merge("HSV", [Image.fromarray(band) for band in (turned, s, v)]).convert("RGB")
        else:
            kind = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][change]
            picture = kind(picture).enhance(rng.uniform(0.6, 1.4))
    np.testing.assert_array_equal(color_jitter(array, np.random.default_rng(3), 0.4), np.asarray(picture))


class Broken:
    """Records of which some cannot be read."""

    num_classes = None

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if self.bad.get(index) == "unreadable":
            raise OSError("disk")
        if index in self.bad:
            raise BadImage(self.bad[index])
        return {"image": np.full((2, 2, 3), index, np.uint8)}


def test_bad_images_are_replaced_by_a_rule_and_told():
    load = LoadImage(source=Broken({3: "truncated", 4: "unreadable"}), channels=3, max_pixels=100)
    clean = LoadImage(source=Broken({}), channels=3, max_pixels=100)
    for record in range(10):
        got = load(record, np.random.default_rng(record))
        if record not in (3, 4):
            np.testing.assert_array_equal(got["image"], clean(record, np.random.default_rng(0))["image"])
            assert read_faults(got["faults"]) == []
        else:
            cause = "truncated" if record == 3 else "unreadable"
            assert read_faults(got["faults"])[0] == (record, cause)
            replacement = [int(np.random.default_rng(record).integers(10))]
            assert got["index"] == replacement[0] or replacement[0] in (3, 4)
            assert got["index"] == got["image"][0, 0, 0]


def test_when_nothing_can_be_read_the_image_is_black_and_all_tries_are_told():
    load = LoadImage(source=Broken({i: "corrupt" for i in range(10)}), channels=3, max_pixels=100)
    got = load(0, np.random.default_rng(0))
    assert not got["image"].any() and len(read_faults(got["faults"])) == 4
