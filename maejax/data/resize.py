"""One antialiased bicubic resize for all images: Pillow's filter, in SIMD where there is a wheel for the machine.

Pillow resizes in plain C, which took as long as decoding the JPEG. cykooz.resizer does the same in 16-bit integers, in
the other order of axes, and gives the same bits on every kind of CPU. The two differ by less than 1/255 on average.
"""

import importlib
import math
from typing import Any

import numpy as np
from PIL import Image

try:
    simd: Any = importlib.import_module("cykooz_resizer")
    BICUBIC = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)  # a = -0.5, as in Pillow
    WHOLE = simd.ResizeOptions(BICUBIC, use_alpha=False)
except ImportError:  # Linux on ARM, for which there is no wheel
    simd = None

Box = tuple[float, float, float, float]  # top, left, height, width


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h w c) -> uint8 (*size c), antialiased bicubic; `image` may be any view, and itself comes back if it fits."""
    return image if image.shape[:2] == size else resize_box(image, (0, 0, *image.shape[:2]), size)


def resize_box(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """A box of an image (h w c) -> uint8 (*size c). The box may begin and end inside of pixels."""
    top, left, h, w = box
    up, start = math.floor(top), math.floor(left)
    part = image[up : math.ceil(top + h), start : math.ceil(left + w)]
    inside = (top - up, left - start, min(h, part.shape[0] - top + up), min(w, part.shape[1] - left + start))
    resized = with_pillow if simd is None else with_simd
    if image.shape[2] <= 4:
        return resized(part, inside, size)
    return np.concatenate([resized(part[..., c : c + 1], inside, size) for c in range(image.shape[2])], axis=-1)


def with_simd(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Up to four channels, each for itself, at once. The one copy of the pixels makes a view contiguous."""
    kind = simd.PixelType(image.shape[2])
    source = simd.ImageData(image.shape[1], image.shape[0], kind, image.tobytes())
    target = simd.ImageData(size[1], size[0], kind)
    options = WHOLE
    if box != (0, 0, *image.shape[:2]):
        top, left, h, w = box
        options = simd.ResizeOptions(BICUBIC, use_alpha=False, crop_box=simd.CropBox(left, top, w, h))
    simd.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, image.shape[2])


def with_pillow(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The same by Pillow, where there is nothing faster."""
    edges = (box[1], box[0], box[1] + box[3], box[0] + box[2])

    def resized(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, edges))

    if image.shape[2] in (3, 4):  # four channels as RGBX: with an alpha, Pillow would premultiply
        mode = "RGB" if image.shape[2] == 3 else "RGBX"
        picture = Image.frombytes(mode, (image.shape[1], image.shape[0]), image.tobytes())
        return resized(picture)
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
    return np.stack([resized(plane) for plane in planes], axis=-1)
