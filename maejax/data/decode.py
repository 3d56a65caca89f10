"""Encoded images and records to uint8 arrays: every common format and mode, upright, or a named reason why not.

JPEG goes through simplejpeg (the same pixels as Pillow's, faster), everything else through Pillow.
"""

import importlib
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# Causes of a bad image. Their numbers stand in batches and checkpoints: append, never reorder.
CAUSES = (
    "unreadable", "empty", "not_an_image", "truncated", "too_large", "channels", "corrupt", "timeout", "crashed",
)  # fmt: skip

PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # a text chunk is no reason to allocate more
WHITE = (255, 255, 255, 255)

# What Pillow may open. Not EPS, for one, which it hands to Ghostscript: files come from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")  # libjpeg left the image before its data ended
PILLOW = re.compile(r"PIL\.")  # modules whose warnings are not shown
TOLERATED = 0.01  # share of a JPEG file's bytes that may be such leftovers, as some cameras pad

# From the pixels as stored to upright ones, by EXIF's orientation.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


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
        shape = _npy_header(image)[0]
        return "NPY", shape[0], shape[1]
    _silence_pillow()
    try:
        with _opened(image) as opened:
            return opened.format or "?", opened.height, opened.width
    except Exception as error:  # broken headers raise whatever the plugin stumbles over
        raise _classified(error, image) from error


def _opened(image: bytes) -> Image.Image:
    """Pillow's image, its header read."""
    Image.init()  # or Pillow would not know all of its formats
    return Image.open(io.BytesIO(image), formats=[name for name in FORMATS if name in Image.OPEN])


def _silence_pillow() -> None:
    """Lets pass what Pillow warns of in odd metadata; what matters raises.

    Not with catch_warnings: images are decoded in threads, and leaving it there restores another thread's filters.
    """
    if not warnings.filters or warnings.filters[0][3] != PILLOW:
        warnings.filterwarnings("ignore", module=PILLOW.pattern)


def _jpeg(image: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """simplejpeg's pixels, upright; None for what only Pillow can read (CMYK, rare encodings).

    Damage is found here for all of them: Pillow fills what is missing with grey and says nothing.
    """
    if channels not in (1, 3, 4):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    color = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colorspace, "RGB")
    try:
        pixels = simplejpeg.decode_jpeg(image, color, strict=True)
    except ValueError as error:
        _check_damage(str(error), len(image))
        return None
    if color == "CMYK":
        return None
    # EXIF sits in the first segments; without the marker there is no orientation to look up.
    turn = orientation(image) if b"Exif\0\0" in image[:65536] else 1
    return _from_array(TURNS.get(turn, np.asarray)(pixels), channels, max_pixels)


def orientation(image: bytes) -> int:
    """What EXIF says of it, 1 (upright) to 8; 1 if that cannot be read."""
    _silence_pillow()
    try:
        with _opened(image) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of metadata, anything; the pixels are whole
        return 1


def _check_damage(said: str, size: int) -> None:
    """Raises BadImage if libjpeg, reading a JPEG of `size` bytes strictly, said that pixels are missing."""
    if "premature end" in said.lower():
        raise BadImage("truncated", said)
    leftover = EXTRANEOUS.search(said)
    if "Huffman" in said or (leftover and int(leftover[1]) > TOLERATED * size):
        raise BadImage("corrupt", said)


def _with_pillow(image: bytes, channels: int, max_pixels: int) -> np.ndarray:
    if channels not in (1, 3, 4):
        raise BadImage("channels", f"an encoded image has 1, 3 or 4, not {channels}; use .npy arrays")
    _silence_pillow()
    try:
        with _opened(image) as opened:
            _check_size(opened.height, opened.width, max_pixels)
            opened.load()
            return _pixels(ImageOps.exif_transpose(opened), channels, wide=opened.format == "PPM")
    except BadImage:
        raise
    except Exception as error:
        raise _classified(error, image) from error


def _pixels(image: Image.Image, channels: int, *, wide: bool = False) -> np.ndarray:
    """A loaded image of any mode -> uint8 (h w channels); `wide`: its integers are known to be of 16 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image), wide=wide))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def _to_8_bits(values: np.ndarray, *, wide: bool) -> np.ndarray:
    """16-bit (or wider) integers by their range, floats in [0, 1] or [0, 255]."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64))
        return np.clip(np.rint(values * 255 if values.max(initial=0) <= 1 else values), 0, 255).astype(np.uint8)
    wide = wide or values.dtype.itemsize == 2 or values.max(initial=0) > 255
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


def _npy_header(image: bytes) -> tuple[tuple[int, ...], np.dtype[Any], str, int]:
    """Shape, dtype, order ("C" or "F") and the place of the first value, from the header of a .npy file.

    Not by NumPy, for which the header is Python source: CPython 3.11 cannot parse that in several threads at once
    without an error now and then, and a good image would be replaced by another one.
    """
    digits = 2 if image[6:7] == b"\1" else 4  # of the length, by the version
    start = 8 + digits
    end = start + int.from_bytes(image[8:start], "little")
    text = image[start:end].decode("latin-1")
    kind = re.search(r"['\"]descr['\"]\s*:\s*['\"]([<>|=]?u[12])['\"]", text)
    fortran = re.search(r"['\"]fortran_order['\"]\s*:\s*(True|False)", text)
    sides = re.search(r"['\"]shape['\"]\s*:\s*\( *(\d{1,30}(?: *, *\d{1,30})*) *,? *\)", text)
    if not (kind and fortran and sides):
        raise BadImage("corrupt", f"{text.strip()[:100]!r} is no header of uint8 (h w c)")
    shape = tuple(int(side) for side in sides[1].split(","))
    dtype = np.dtype(kind[1])
    if len(shape) not in (2, 3):
        raise BadImage("corrupt", f"array {dtype} {shape}, expected uint8 (h w c)")
    if len(image) - end < math.prod(shape) * dtype.itemsize:
        raise BadImage("truncated")
    return shape, dtype, "F" if fortran[1] == "True" else "C", end


def _load_npy(image: bytes, max_pixels: int) -> np.ndarray:
    shape, dtype, order, start = _npy_header(image)
    _check_size(shape[0], shape[1], max_pixels)
    flat = np.frombuffer(image, dtype, math.prod(shape), start)
    values = flat.reshape(shape[::-1]).T if order == "F" else flat.reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


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
    if image.startswith(b"RIFF") and int.from_bytes(image[4:8], "little") + 8 > len(image):
        return BadImage("truncated", text)  # WebP's decoder does not say so
    if "truncated" in text.lower() or "not enough" in text.lower() or "eof" in text.lower():
        return BadImage("truncated", text)
    return BadImage("corrupt", text)


def make_example(image: bytes, label: int) -> bytes:
    """A serialized tf.train.Example, as `parse_record` reads it."""
    proto = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2
    example = proto.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(int(label))
    return example.SerializeToString(deterministic=True)


def parse_record(record: bytes) -> dict[str, Any]:
    """An encoded image, or a serialized tf.train.Example.

    Of an Example, `image` or `image/encoded` and `label` or `image/class/label` are read.
    """
    if not record.startswith(b"\n"):  # field 1 of an Example; no image format begins so
        return {"image": record}
    from google.protobuf.message import DecodeError

    proto = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2
    try:
        features = proto.Example.FromString(record).features.feature
    except DecodeError as error:
        raise BadImage("corrupt", str(error)) from error
    for key in ("image", "image/encoded"):
        if key in features and features[key].bytes_list.value:
            found: dict[str, Any] = {"image": features[key].bytes_list.value[0]}
            break
    else:
        raise BadImage("not_an_image", f"an Example with {', '.join(sorted(features))}")
    for key in ("label", "image/class/label"):
        if key in features and features[key].int64_list.value:
            found["label"] = int(features[key].int64_list.value[0])
            break
    return found
