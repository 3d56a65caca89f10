"""RandAugment's operations against Pillow's own and values by hand."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from maejax.data import randaugment
from maejax.data.randaugment import OPERATIONS, rand_augment
from maejax.data.transforms import erasing_box

FILL = (124, 116, 104)


def photo(h=40, w=60):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    return smooth


class Fixed:
    """A generator whose coin always falls on one side."""

    def __init__(self, sign):
        self._sign = sign

    def random(self):
        return 0.1 if self._sign < 0 else 0.9


def apply(name, m, sign=1, image=None):
    return np.asarray(OPERATIONS[name](image or photo(), m, Fixed(sign), FILL))


@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_are_pillows(sign):
    image, m = photo(), 9.0
    bicubic, affine = Image.Resampling.BICUBIC, Image.Transform.AFFINE
    expected = {
        "auto_contrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "invert": ImageOps.invert(image),
        "rotate": image.rotate(sign * 27.0, resample=bicubic, fillcolor=FILL),
        "posterize": ImageOps.posterize(image, 1),  # 4 - int(0.9 * 4)
        "solarize": ImageOps.solarize(image, 26),  # 256 - int(0.9 * 256)
        "color": ImageEnhance.Color(image).enhance(1 + sign * 0.81),
        "contrast": ImageEnhance.Contrast(image).enhance(1 + sign * 0.81),
        "brightness": ImageEnhance.Brightness(image).enhance(1 + sign * 0.81),
        "sharpness": ImageEnhance.Sharpness(image).enhance(1 + sign * 0.81),
        "shear_x": image.transform(image.size, affine, (1, sign * 0.27, 0, 0, 1, 0), bicubic, fillcolor=FILL),
        "shear_y": image.transform(image.size, affine, (1, 0, 0, sign * 0.27, 1, 0), bicubic, fillcolor=FILL),
        "translate_x": image.transform(
            image.size, affine, (1, 0, sign * 0.405 * 60, 0, 1, 0), bicubic, fillcolor=FILL
        ),
        "translate_y": image.transform(
            image.size, affine, (1, 0, 0, 0, 1, sign * 0.405 * 40), bicubic, fillcolor=FILL
        ),
    }  # fmt: skip
    for name, picture in expected.items():
        np.testing.assert_allclose(apply(name, m, sign), np.asarray(picture), atol=1, err_msg=name)
    assert expected.keys() | {"solarize_add"} == OPERATIONS.keys()


def test_solarize_add_and_posterize_by_hand():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2))
    added = apply("solarize_add", 9.0, image=ramp)[0, :, 0]
    assert added[0] == 99 and added[127] == 226 and added[128] == 128 and added[255] == 255
    assert set(apply("posterize", 0.0, image=ramp)[0, :, 0]) == set(range(0, 256, 16))
    assert set(apply("posterize", 10.0, image=ramp)[0, :, 0]) == {0}
    assert (apply("solarize", 0.0, image=ramp) == np.asarray(ramp)).all()
    assert (apply("solarize", 10.0, image=ramp) == 255 - np.asarray(ramp)).all()


def test_enhancements_never_go_below_a_tenth():
    np.testing.assert_array_equal(
        apply("brightness", 10.0, -1), np.asarray(ImageEnhance.Brightness(photo()).enhance(0.1))
    )


def test_magnitudes_and_chances(monkeypatch):
    seen = []
    monkeypatch.setattr(randaugment, "OPERATIONS", {"note": lambda image, m, rng, fill: seen.append(m) or image})
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rand_augment(np.zeros((4, 4, 3), np.uint8), rng, magnitude=9.0, fill=FILL)
    assert len(seen) == pytest.approx(2000, rel=0.05)  # two operations, each with even chances
    assert np.mean(seen) == pytest.approx(9.0, abs=0.05) and np.std(seen) == pytest.approx(0.5, abs=0.05)
    assert max(seen) <= 10


def test_it_depends_on_the_generator_alone():
    image = np.asarray(photo())
    one, two = (rand_augment(image, np.random.default_rng(5), magnitude=9.0, fill=FILL) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    drawn = {rand_augment(image, np.random.default_rng(i), magnitude=9.0, fill=FILL).tobytes() for i in range(20)}
    assert len(drawn) > 10


def test_erasing_boxes_keep_their_limits():
    rng = np.random.default_rng(0)
    boxes = np.array([erasing_box((64, 48), rng) for _ in range(1000)])
    top, left, h, w = boxes.T
    assert (h > 0).all() and (top + h <= 64).all() and (left + w <= 48).all()
    area, aspect = h * w / (64 * 48), h / w
    assert 0.015 < area.min() < 0.03 and 0.3 < area.max() < 0.35
    assert 0.25 < aspect.min() and aspect.max() < 4
