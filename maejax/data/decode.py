"""Encoded images to uint8 arrays: every common format and mode, turned upright, or a named reason why not.

JPEG goes through simplejpeg (the same pixels as Pillow's, faster), everything else through Pillow.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# Causes of a bad image. Their numbers stand in batches and checkpoints: append, never reorder.
CAUSES = ("unreadable", "empty", "not_an_image", "truncated", "too_large", "channels", "corrupt")

PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # a text chunk is no reason to allocate more
WHITE = (255, 255, 255, 255)


class BadImage(Exception):
    """An image that cannot be used; `cause` is one of `CAUSES`."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause = cause


def decode(image: bytes | np.ndarray, *, channels: int, max_pixels: int) -> np.ndarray:
    """An image, encoded or an array (h w c), as a contiguous uint8 array (h w channels).

    Orientation from EXIF is applied; transparency is put on white (for 1 and 3 channels); 16 bits are scaled to 8; of
    an animation the first frame is taken. Channels 1 is luma, 3 RGB, 4 RGBA; any other number must be the array's own.

    Raises:
      BadImage: with one of CAUSES; "too_large" (more than `max_pixels`) is decided from the header.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, channels, max_pixels)
    if not image:
        raise BadImage("empty")
    if image[:3] == b"\xff\xd8\xff" and (pixels := _jpeg(image, channels, max_pixels)) is not None:
        return pixels
    if image[:6] == b"\x93NUMPY":
        return _from_array(_load_npy(image, max_pixels), channels, max_pixels)
    return _with_pillow(image, channels, max_pixels)


def header(image: bytes) -> tuple[str, int, int]:
    """Format, height and width, from the header alone; raises BadImage if there is none."""
    if not image:
        raise BadImage("empty")
    if image[:6] == b"\x93NUMPY":
        shape = _npy_shape(image)
        return "NPY", shape[0], shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(image)) as opened:
                return opened.format or "?", opened.height, opened.width
        except Exception as error:  # broken headers raise whatever the plugin stumbles over
            raise _classified(error, image) from error


def _jpeg(image: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """simplejpeg's pixels; None for what Pillow does better (CMYK, EXIF that turns, damaged files)."""
    if channels not in (1, 3):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    ours = colorspace == "Gray" or (channels == 3 and colorspace in ("YCbCr", "RGB"))
    # EXIF sits in the first segments; without the marker there is no orientation to look up.
    turned, whole = b"Exif\0\0" in image[:65536], image.rstrip(b"\0").endswith(b"\xff\xd9")
    if not ours or turned or not whole:
        return None
    try:
        return simplejpeg.decode_jpeg(image, "GRAY" if channels == 1 else "RGB", strict=True)
    except ValueError:
        return None


def _with_pillow(image: bytes, channels: int, max_pixels: int) -> np.ndarray:
    if channels not in (1, 3, 4):
        raise BadImage("channels", f"an encoded image has 1, 3 or 4, not {channels}; use .npy arrays")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; what matters raises
        try:
            with Image.open(io.BytesIO(image)) as opened:
                _check_size(opened.height, opened.width, max_pixels)
                opened.load()
                return _pixels(ImageOps.exif_transpose(opened), channels)
        except BadImage:
            raise
        except Exception as error:
            raise _classified(error, image) from error


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """A loaded image of any mode -> uint8 (h w channels)."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """16-bit (or wider) integers by their range, floats in [0, 1] or [0, 255]."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64))
        return np.clip(np.rint(values * 255 if values.max(initial=0) <= 1 else values), 0, 255).astype(np.uint8)
    wide = values.dtype == np.uint16 or values.max(initial=0) > 255
    values = values.astype(np.int64)
    if wide:
        values = (np.clip(values, 0, 65535) + 128) // 257  # 65535 -> 255, rounded
    return np.clip(values, 0, 255).astype(np.uint8)


def _from_array(array: np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape:
        raise BadImage("corrupt", f"array {array.dtype} {array.shape}, expected uint8 (h w c)")
    _check_size(array.shape[0], array.shape[1], max_pixels)
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.shape[2] == channels:
        return np.ascontiguousarray(array)
    if array.shape[2] in (1, 3, 4) and channels in (1, 3, 4):
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
        return _pixels(image, channels)
    raise BadImage("channels", f"{array.shape[2]}, expected {channels}")


def _npy_shape(image: bytes) -> tuple[int, ...]:
    """The shape in a .npy header, without allocating what it promises."""
    try:
        file = io.BytesIO(image)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise BadImage("corrupt", str(error)) from error
    if dtype.hasobject or len(shape) not in (2, 3):
        raise BadImage("corrupt", f"array {dtype} {shape}, expected uint8 (h w c)")
    if len(image) - file.tell() < np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise BadImage("truncated")
    return shape


def _load_npy(image: bytes, max_pixels: int) -> np.ndarray:
    shape = _npy_shape(image)
    _check_size(shape[0], shape[1], max_pixels)
    return np.load(io.BytesIO(image), allow_pickle=False)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage("too_large", f"{width}x{height}, more than data.max_pixels={max_pixels}")


def _classified(error: Exception, image: bytes) -> BadImage:
    """The cause behind what Pillow raised."""
    text = str(error)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("too_large", text)
    if isinstance(error, UnidentifiedImageError):
        magic = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
        return BadImage("truncated" if image.startswith(magic) else "not_an_image")
    if "truncated" in text.lower() or "not enough" in text.lower() or "eof" in text.lower():
        return BadImage("truncated", text)
    return BadImage("corrupt", text)
