"""From a record's number to a training example: read and decode, crop, flip, color. One example at a time.

Each transform draws from the generator of the example's place in the stream and from nothing else; see `batches`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageEnhance

from maejax.data.decode import CAUSES, BadImage, decode
from maejax.data.desk import on_the_desk
from maejax.data.partial import decode_part
from maejax.data.randaugment import rand_augment
from maejax.data.resize import resize, resize_box

LONGEST = 16  # how often `size` goes into the longer side that `cover` returns, at most
TRIES = 4  # records that are read for one place in the stream before it is left black
Box = tuple[int, int, int, int]  # top, left, height, width


class Records(Protocol):
    """What an example is read from; see `sources`."""

    num_classes: int | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadImage:
    """Record number -> {"image": uint8 (h w c), "index": int64, "faults": int64 (4,)} and "label" if there is one.

    A record that cannot be read is replaced by another one, drawn from the place's own generator: the same in every
    run, and no other place is touched. `faults` holds record * 16 + cause of each failed try, or -1.
    """

    source: Records
    channels: int
    max_pixels: int
    unusable: Mapping[int, str] = dataclasses.field(default_factory=dict)  # records never to be read, and why
    part: "Augment | None" = None  # decode only what this one's random crop needs, and add that crop as `box`

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Reads, with replacements."""
        faults = np.full(TRIES, -1, np.int64)
        for tried in range(TRIES):
            try:
                return self._read(index, rng) | {"faults": faults}
            except BadImage as error:
                faults[tried] = index * 16 + CAUSES.index(error.cause)
            index = int(rng.integers(len(self.source)))
        black = np.zeros((1, 1, self.channels), np.uint8)
        label = {} if self.source.num_classes is None else {"label": np.int32(0)}
        return {"image": black, "index": np.int64(index), "faults": faults} | label

    def _read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        if index in self.unusable:
            raise BadImage(self.unusable[index])
        limits, a = {"channels": self.channels, "max_pixels": self.max_pixels}, self.part
        with on_the_desk(index):
            record = read_record(self.source, index)
            if a is None:
                example: dict[str, Any] = {"image": decode(record["image"], **limits)}
            else:
                draw = functools.partial(random_box, rng=rng, scale=a.scale, ratio=a.ratio)
                image, box = decode_part(record["image"], draw, a.size, **limits)
                example = {"image": image, "box": box}
        label = {} if self.source.num_classes is None else {"label": np.int32(record.get("label", -1))}
        return example | {"index": np.int64(index)} | label


def read_record(source: Records, index: int) -> dict[str, Any]:
    """`source[index]`; a failing disk or a damaged ArrayRecord file makes it a bad image."""
    try:
        return source[index]
    except (OSError, RuntimeError) as error:
        raise BadImage("unreadable", str(error)) from error


def read_faults(faults: np.ndarray) -> list[tuple[int, str]]:
    """(record, cause) of every failed try in a batch's `faults` (b 4)."""
    return [(int(code) // 16, CAUSES[int(code) % 16]) for code in faults.reshape(-1) if code >= 0]


def records_of(index: np.ndarray, faults: np.ndarray, repeats: int = 1) -> np.ndarray:
    """The records (b) that the order of the stream asked for, whether or not they could be read.

    Of `repeats` examples of one record, the first one tells.
    """
    index, first = index[::repeats], faults[::repeats, 0]
    return np.repeat(np.where(first >= 0, first // 16, index), repeats)


# ---- Crops ----------------------------------------------------------------------------------------------------------


def between(low: float, high: float, share: float) -> float:
    """From one to the other; `rng.random()` as the share takes a quarter of the time of `rng.uniform`."""
    return low + (high - low) * share


def random_box(
    height: int, width: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random box as torchvision's RandomResizedCrop draws it.

    Area uniform in `scale` times the image's, width / height log-uniform in `ratio`; ten tries, then the largest
    centered box whose ratio is allowed.
    """
    for _ in range(10):
        area = height * width * between(*scale, rng.random())
        aspect = math.exp(between(math.log(ratio[0]), math.log(ratio[1]), rng.random()))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height <= aspect else (round(height * aspect), height)
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The box of an image (h w c), resized to (*size c).

    Cropped first, without a copy: Pillow's own `resize(box=...)` lets pixels from outside the box in, torchvision does
    not.
    """
    top, left, h, w = box
    return resize(image[top : top + h, left : left + w], size)


def cover(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resized, aspect kept, so that it just covers `size`.

    Of an image that would be more than LONGEST times as long as that, only the middle: 1 x 20,000 pixels would
    otherwise take gigabytes to cover a square.
    """
    factor = max(size[0] / image.shape[0], size[1] / image.shape[1])
    for axis, side in enumerate(size):
        most = math.ceil(LONGEST * side / factor)
        if (extra := image.shape[axis] - most) > 0:
            image = image.take(range(extra // 2, extra // 2 + most), axis)
    h, w = (max(round(side * factor), least) for side, least in zip(image.shape[:2], size, strict=True))
    return resize(image, (h, w))


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(h w c) with its shorter side no longer than `side`: resized as `cover` does, or itself. For packs and caches."""
    return image if min(image.shape[:2]) <= side else cover(image, (side, side))


def random_resized(image: np.ndarray, rng: np.random.Generator, *, size: tuple[int, int], **limits: Any) -> np.ndarray:
    """The paper's augmentation: a random box, resized to `size`."""
    return crop_resize(image, random_box(image.shape[0], image.shape[1], rng, **limits), size)


def fixed(image: np.ndarray, rng: np.random.Generator, *, size: tuple[int, int], **_: Any) -> np.ndarray:
    """The paper's "crop, fixed size" (Table 1e): resized to 8/7 of `size`, then a box of `size` at a random place."""
    image = cover(image, (round(size[0] * 8 / 7), round(size[1] * 8 / 7)))
    top, left = (int(rng.integers(have - want + 1)) for have, want in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def center(
    image: np.ndarray, rng: np.random.Generator | None, *, size: tuple[int, int], share: float = 1.0, **_: Any
) -> np.ndarray:
    """No augmentation: resized to cover `size` / `share`, then its center of `size`."""
    image = cover(image, (int(size[0] / share), int(size[1] / share)))
    top, left = ((have - want) // 2 for have, want in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


CROPS: dict[str, Callable[..., np.ndarray]] = {"random_resized": random_resized, "fixed": fixed, "center": center}


def copy_pixels(image: np.ndarray, target: np.ndarray) -> None:
    """(h w c) into an array of that shape. Mirrored colors go plane by plane, which NumPy does four times as fast."""
    if image.strides[1] > 0 or image.shape[2] > 4:
        target[...] = image
        return
    for c in range(image.shape[2]):
        target[..., c] = image[..., c]


# ---- Color ----------------------------------------------------------------------------------------------------------


def color_jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation by factors in 1 +- strength, hue by +- strength / 4 of a turn.

    torchvision's ColorJitter on Pillow images: the four in random order. `image` is uint8 (h w 3).
    """
    picture = Image.fromarray(image)
    for change in rng.permutation(4):
        if change == 3:
            h, s, v = picture.convert("HSV").split()
            turned = np.asarray(h) + np.uint8(int(rng.uniform(-strength, strength) / 4 * 255) % 256)
            picture = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
        else:
            enhance: Any = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
            picture = enhance(picture).enhance(rng.uniform(max(1 - strength, 0), 1 + strength))
    return np.asarray(picture)


def erasing_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A box of 0.02 to 1/3 of an image's area, sides in a ratio of 0.3 to 1/0.3 (Zhong et al. 2020; timm's limits)."""
    for _ in range(10):
        area = size[0] * size[1] * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < size[0] and w < size[1]:
            return int(rng.integers(size[0] - h + 1)), int(rng.integers(size[1] - w + 1)), h, w
    return (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Crops an example's image to `size` (height, width), flips and colors it.

    With `erasing` it adds `erase` int32 (4,): the box that training fills with noise, of height 0 for none.
    """

    size: tuple[int, int]
    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: float = 0.0
    rand_augment: float = 0.0  # magnitude; 0: none
    fill: tuple[int, ...] = (124, 116, 104)  # of what RandAugment lets in from outside the image
    erasing: float = 0.0  # chance of a box

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Crop, then flip, then color, then the operations of RandAugment. `image` may come out as a view."""
        if "box" in example:  # drawn already, to decode no more than that
            image = resize_box(example["image"], example["box"], self.size)
            example = {key: value for key, value in example.items() if key != "box"}
        else:
            image = CROPS[self.crop](example["image"], rng, size=self.size, scale=self.scale, ratio=self.ratio)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if image.shape[2] == 3 and (self.color_jitter or self.rand_augment):
            image = self._colored(image, rng)
        added = {"image": image}
        if self.erasing:
            box = erasing_box(self.size, rng) if rng.random() < self.erasing else (0, 0, 0, 0)
            added["erase"] = np.array(box, np.int32)
        return example | added

    def _colored(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = np.empty(view.shape, np.uint8)
        copy_pixels(view, image)
        if self.color_jitter:
            image = color_jitter(image, rng, self.color_jitter)
        if self.rand_augment:
            image = rand_augment(image, rng, magnitude=self.rand_augment, fill=self.fill)
        return image
