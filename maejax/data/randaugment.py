"""RandAugment (Cubuk et al. 2020) as the official fine-tuning has it: timm's `rand-m9-mstd0.5-inc1`.

Two operations, drawn with replacement from fifteen, each applied with even chances at a magnitude drawn around the
given one. In this "increasing" set a greater magnitude is a stronger change, for every operation.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

DEVIATION = 0.5  # of the magnitude, which lies in [0, 10]
NUM_OPS = 2
CHANCE = 0.5  # that a drawn operation is applied
Fill = tuple[int, ...]


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(image: Image.Image, matrix: Sequence[float], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, tuple(matrix), resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def rotate(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """By up to 30 degrees."""
    return image.rotate(_signed(m * 3, rng), resample=Image.Resampling.BICUBIC, fillcolor=fill)


def shear_x(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Rows shifted in proportion to their height, by up to 0.3."""
    return _affine(image, (1, _signed(m * 0.03, rng), 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Columns shifted in proportion to their place, by up to 0.3."""
    return _affine(image, (1, 0, 0, _signed(m * 0.03, rng), 1, 0), fill)


def translate_x(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Sideways, by up to 0.45 of the width."""
    return _affine(image, (1, 0, _signed(m * 0.045, rng) * image.width, 0, 1, 0), fill)


def translate_y(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Up or down, by up to 0.45 of the height."""
    return _affine(image, (1, 0, 0, 0, 1, _signed(m * 0.045, rng) * image.height), fill)


def auto_contrast(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Each channel stretched to the whole range; knows no magnitude."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """A flat histogram in each channel; knows no magnitude."""
    return ImageOps.equalize(image)


def invert(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """The negative; knows no magnitude."""
    return ImageOps.invert(image)


def posterize(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """The 4 to 0 highest bits of each value kept."""
    bits = 4 - int(m * 0.4)
    return image.point([value & ~(2 ** (8 - bits) - 1) & 255 for value in range(256)] * len(image.getbands()))


def solarize(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Values from a threshold on inverted; the threshold falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - min(256, int(m * 25.6)))


def solarize_add(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """Up to 110 added to values below 128."""
    add = min(128, int(m * 11))
    return image.point(
        [min(255, value + add) if value < 128 else value for value in range(256)] * len(image.getbands())
    )


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> "Operation":
    def operation(image: Image.Image, m: float, rng: np.random.Generator, fill: Fill) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + _signed(m * 0.09, rng)))

    return operation


Operation = Callable[[Image.Image, float, np.random.Generator, Fill], Image.Image]
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def rand_augment(image: np.ndarray, rng: np.random.Generator, *, magnitude: float, fill: Fill) -> np.ndarray:
    """uint8 (h w 3) -> uint8 (h w 3); `fill` is the color of what comes in from outside the image."""
    picture = Image.fromarray(image)
    for number in rng.integers(len(OPERATIONS), size=NUM_OPS):
        if rng.random() < CHANCE:
            m = min(max(rng.normal(magnitude, DEVIATION), 0.0), 10.0)
            picture = tuple(OPERATIONS.values())[number](picture, m, rng, fill)
    return np.asarray(picture)
