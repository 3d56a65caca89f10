"""Every odd image has a written outcome: exact pixels, or a cause."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from maejax.data.decode import CAUSES, BadImage, decode, header

MAX = 10_000_000


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(h: int = 9, w: int = 7, c: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def rgb(data: bytes | np.ndarray) -> np.ndarray:
    return decode(data, channels=3, max_pixels=MAX)


def photo() -> Image.Image:
    """Smooth, so that JPEG's losses stay small; not symmetric."""
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([4 * x, 5 * y, 2 * x + y], -1).astype(np.uint8))


@pytest.mark.parametrize(
    "form, options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PPM", {})]
)
def test_lossless_formats_give_their_pixels(form, options):
    array = noise()
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(array), form, **options)), array)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 50}])
def test_jpeg_gives_pillows_pixels(options):
    data = encoded(photo(), "JPEG", **options)
    np.testing.assert_array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_jpeg_in_one_and_three_channels():
    data = encoded(photo().convert("L"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(rgb(data), np.repeat(expected[..., None], 3, -1))
    np.testing.assert_array_equal(decode(data, channels=1, max_pixels=MAX), expected[..., None])


def test_color_jpeg_as_luma():
    data = encoded(photo(), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[..., None]
    np.testing.assert_array_equal(decode(data, channels=1, max_pixels=MAX), expected)


# Where the stored image's top left pixel row and column end up, by EXIF's own definition of the eight orientations.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), form, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(rgb(data), TURNS[orientation](stored))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_exif_orientation_in_other_numbers_of_channels(channels, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), "JPEG", exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(48, 64, channels)
    np.testing.assert_array_equal(decode(data, channels=channels, max_pixels=MAX), np.rot90(stored, -1))


def test_broken_exif_is_ignored():
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0not a tiff header at all")
    assert rgb(data).shape == (48, 64, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.array([[0, 257, 32896, 65535]], np.uint16)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(ramp)))[0, :, 0], [0, 1, 128, 255])
    dark = np.array([[0, 128, 200]], np.uint16)  # a dark image is dark, not an 8-bit one
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(dark)))[0, :, 0], [0, 0, 1])


def test_sixteen_bit_pgm_is_scaled_even_where_it_is_dark():
    data = b"P5\n3 1\n65535\n" + np.array([0, 128, 200], ">u2").tobytes()
    np.testing.assert_array_equal(rgb(data)[0, :, 0], [0, 0, 1])  # 200 / 257 = 0.78


def test_float_tiff():
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(values), "TIFF"))[0, :, 0], [0, 128, 255])


def test_alpha_is_put_on_white():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    data = encoded(Image.fromarray(pixels, "RGBA"))
    np.testing.assert_array_equal(rgb(data)[0], [[10, 20, 30], [255, 255, 255], [204, 204, 204]])
    np.testing.assert_array_equal(decode(data, channels=4, max_pixels=MAX), pixels)


def test_grey_with_alpha():
    pixels = np.array([[[100, 255], [100, 0]]], np.uint8)
    data = encoded(Image.fromarray(pixels, "LA"))
    np.testing.assert_array_equal(rgb(data)[0], [[100] * 3, [255] * 3])
    np.testing.assert_array_equal(decode(data, channels=1, max_pixels=MAX)[0, :, 0], [100, 255])


def palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def test_palette_with_and_without_transparency():
    colors = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    np.testing.assert_array_equal(rgb(encoded(palette()))[0], colors)
    np.testing.assert_array_equal(rgb(encoded(palette(), transparency=1))[0], [colors[0], [255] * 3, colors[2]])
    np.testing.assert_array_equal(rgb(encoded(palette(), "GIF"))[0], colors)


def test_one_bit():
    image = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(rgb(encoded(image))[0, :, 0], [0, 255, 255])


def test_cmyk_jpeg():
    cmyk = photo().convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=100)
    assert np.abs(rgb(data).astype(int) - np.asarray(photo()).astype(int)).mean() < 3


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(noise(seed=s)) for s in (1, 2)]
    for form, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(rgb(data), np.asarray(frames[0]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(shape):
    array = noise(*shape)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(array))), array)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_arrays_of_any_number_of_channels():
    array = noise(c=7)
    for image in (array, npy(array)):
        np.testing.assert_array_equal(decode(image, channels=7, max_pixels=MAX), array)
    grey = noise(c=1)
    np.testing.assert_array_equal(rgb(grey), np.repeat(grey, 3, -1))
    assert header(npy(array)) == ("NPY", 9, 7)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


JPEG = encoded(photo(), "JPEG")
PNG = encoded(Image.fromarray(noise(60, 60)))
EXIF = Image.Exif()
EXIF[0x0112] = 6
TURNED = encoded(photo(), "JPEG", exif=EXIF)
GREY_ENDED, PROGRESSIVE = Image.fromarray(noise(200, 200)), {"progressive": True}
NOISY, NOISY_CMYK = encoded(GREY_ENDED, "JPEG"), encoded(GREY_ENDED.convert("CMYK"), "JPEG")
NOISY_PROGRESSIVE, WEBP = encoded(GREY_ENDED, "JPEG", **PROGRESSIVE), encoded(GREY_ENDED, "WEBP")
END = b"\xff\xd9"  # JPEG's end-of-image marker


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def npy_header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117) + b"\n"


WRONG_CRC = PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:]


@pytest.mark.parametrize(
    "data, causes",
    [
        (b"", ("empty",)),
        (b"hello, I am a text file called photo.jpg", ("not_an_image",)),
        (b"<html>404 not found</html>", ("not_an_image",)),
        (JPEG[: len(JPEG) // 10], ("truncated",)),
        (JPEG[: len(JPEG) // 2], ("truncated",)),
        (JPEG[: len(JPEG) * 99 // 100], ("truncated",)),
        (PNG[: len(PNG) // 10], ("truncated",)),
        (PNG[: len(PNG) // 2], ("truncated",)),
        (PNG[: len(PNG) * 99 // 100], ("truncated",)),
        (JPEG[:3], ("truncated",)),
        # Cut off and ended again, or padded to their old length: Pillow makes up the rest and says nothing.
        (half(NOISY) + END, ("truncated",)),
        (half(NOISY_PROGRESSIVE) + END, ("truncated",)),
        (half(NOISY_CMYK) + END, ("truncated",)),
        (half(TURNED) + END, ("truncated",)),
        (half(NOISY) + bytes(len(NOISY) // 2), ("truncated",)),
        (half(NOISY) + bytes(len(NOISY) // 2) + END, ("corrupt", "truncated")),
        (half(WEBP), ("truncated",)),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", ("not_an_image",)),
        (npy_header("(-1, 5, 3)") + bytes(90), ("corrupt",)),
        (npy_header("(99999999999999999999, 5, 3)") + bytes(90), ("truncated", "too_large")),
        (npy_header("(((((") + bytes(90), ("corrupt",)),
        (WRONG_CRC, ("corrupt", "truncated")),
        (png_header(30_000, 30_000), ("too_large",)),
        (png_header(100_000, 100_000), ("too_large",)),
        (npy(noise(c=5)), ("channels",)),
        (npy(np.zeros((3, 3, 3), np.float32)), ("corrupt",)),
        (npy(noise())[:-10], ("truncated",)),
        (b"\x93NUMPY\x01\x00garbage", ("corrupt",)),
    ],
)
def test_bad_images_have_a_cause(data, causes):
    with pytest.raises(BadImage) as caught:
        rgb(data)
    assert caught.value.cause in causes
    assert caught.value.cause in CAUSES


@pytest.mark.parametrize("ending", [b"garbage", bytes(100), END])
def test_bytes_after_a_whole_jpeg_do_no_harm(ending):
    np.testing.assert_array_equal(rgb(JPEG + ending), rgb(JPEG))


def test_threads_leave_the_warnings_of_others_alone():
    image = Image.new("P", (64, 64))
    image.putpalette(list(range(256)) * 3)
    data = encoded(image, "PNG", transparency=bytes([0, 5] * 128))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: [rgb(data) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not caught
        warnings.warn("of somebody else", stacklevel=1)
        assert [str(warning.message) for warning in caught] == ["of somebody else"]


def test_bombs_are_refused_from_the_header_alone():
    # The header promises 2.7 GB of pixels; decoding them would take seconds and the memory with it.
    data = png_header(30_000, 30_000)
    with pytest.raises(BadImage, match="too_large"):
        rgb(data)
    assert header(encoded(Image.fromarray(noise()))) == ("PNG", 9, 7)
    with pytest.raises(BadImage, match="truncated"):
        rgb(npy_header("(1000000, 1000000, 3)"))


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_files_as_numpy_writes_them(dtype, order, version):
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(dtype), order=order)
    if dtype != "u1":
        array = np.asarray(array * 257, dtype=dtype, order=order)
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version)
    expected = array if dtype == "u1" else array // 257
    np.testing.assert_array_equal(decode(out.getvalue(), channels=3, max_pixels=MAX), expected)


def test_npy_headers_are_not_parsed_as_python(monkeypatch):
    """As NumPy does: in CPython 3.11 that fails now and then where several threads do it ("AST constructor recursion
    depth mismatch"), and one in ten thousand good images was replaced."""

    def parse(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("ast.literal_eval", parse)
    with pytest.raises(SystemError):  # so that this test would notice
        np.load(io.BytesIO(npy(noise())))
    np.testing.assert_array_equal(rgb(npy(noise())), noise())
