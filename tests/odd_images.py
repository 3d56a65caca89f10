"""Images as they are found in the wild, each with what must become of it: exact pixels, or a cause.

`corpus()` is {file name: (bytes, outcome)}; an outcome is uint8 (h w 3), or one of decode.CAUSES. Pixels are those that
were put in, by the formats' own rules; those of JPEG are Pillow's, for no other reference has the same.
"""
# ruff: noqa: E501 - tables

import gzip
import io
import pickle
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

Outcome = np.ndarray | str

# Where the stored image's top left pixel row and column end up, by EXIF's own definition of the eight orientations.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, form, **options)
    return out.getvalue()


def noise(h: int = 9, w: int = 7, c: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def photo() -> np.ndarray:
    """Smooth, not symmetric."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([4 * x, 5 * y, 2 * x + y], -1).astype(np.uint8)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def grey(values: object) -> np.ndarray:
    """(w) -> (1 w 3)."""
    return np.repeat(np.array([values], np.uint8)[..., None], 3, -1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *between: bytes, depth: int = 8, color: int = 2, pixels: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels or bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + data + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117) + b"\n"


def half(data: bytes, of: int = 2) -> bytes:
    return data[: len(data) // of]


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return bytes((255, marker)) + struct.pack(">H", len(body) + 2) + body


def corpus() -> dict[str, tuple[bytes, Outcome]]:
    """Every file with its outcome."""
    return whole() | turned() | broken()


def whole() -> dict[str, tuple[bytes, Outcome]]:
    """What can be read."""
    array, other, smooth = noise(), noise(seed=1), photo()
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    colors = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    white = colors.copy()
    white[0, 1] = 255
    frames = {"save_all": True, "append_images": [Image.fromarray(other)]}
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    la = np.array([[[100, 255], [100, 0]]], np.uint8)
    one_bit = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 5000, zip=True)
    exact = {
        "plain.png": encoded(array), "plain.bmp": encoded(array, "BMP"), "plain.tif": encoded(array, "TIFF"),
        "lossless.webp": encoded(array, "WEBP", lossless=True), "plain.ppm": encoded(array, "PPM"),
        "lzw.tif": encoded(array, "TIFF", compression="tiff_lzw"), "zip.tif": encoded(array, "TIFF", compression="tiff_deflate"),
        "no-compression.png": encoded(array, compress_level=0), "png-named.JPEG": encoded(array),
        "webp-named.jpg": encoded(array, "WEBP", lossless=True), "icc.png": encoded(array, icc_profile=b"no profile at all"),
        "text.png": encoded(array, pnginfo=text), "trailing.png": encoded(array) + b"garbage",
        "animated.webp": encoded(array, "WEBP", lossless=True, **frames), "animated.png": encoded(array, **frames),
        "pages.tif": encoded(array, "TIFF", **frames), "broken-icc.png": png(1, 1, chunk(b"iCCP", b"x\0\0" + b"not zlib"), pixels=b"\0abc"),
    }  # fmt: skip
    found: dict[str, tuple[bytes, Outcome]] = {name: (data, array) for name, data in exact.items()}
    found["broken-icc.png"] = (exact["broken-icc.png"], np.frombuffer(b"abc", np.uint8).reshape(1, 1, 3))
    found |= {
        "palette.png": (encoded(palette), colors), "palette-transparent.png": (encoded(palette, transparency=1), white),
        "palette.gif": (encoded(palette, "GIF"), colors), "palette.bmp": (encoded(palette, "BMP"), colors),
        "animated.gif": (encoded(palette, "GIF", save_all=True, append_images=[palette.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]), colors),
        "rgba.png": (encoded(Image.fromarray(rgba)), np.array([[[10, 20, 30], [255] * 3, [204] * 3]], np.uint8)),
        "rgba.webp": (encoded(Image.fromarray(rgba[:, :2]), "WEBP", lossless=True, exact=True), np.array([[[10, 20, 30], [255] * 3]], np.uint8)),
        "grey-alpha.png": (encoded(Image.fromarray(la, "LA")), grey([100, 255])),
        "one-bit.png": (encoded(one_bit), grey([0, 255, 255])), "one-bit.bmp": (encoded(one_bit, "BMP"), grey([0, 255, 255])),
        "one-bit.tif": (encoded(one_bit, "TIFF"), grey([0, 255, 255])),
        "sixteen.png": (encoded(np.array([[0, 257, 32896, 65535]], np.uint16)), grey([0, 1, 128, 255])),
        "sixteen-dark.png": (encoded(np.array([[0, 128, 200]], np.uint16)), grey([0, 0, 1])),
        "sixteen.tif": (encoded(np.array([[0, 257, 65535]], np.uint16), "TIFF"), grey([0, 1, 255])),
        "sixteen.pgm": (b"P5\n3 1\n65535\n" + np.array([0, 128, 200], ">u2").tobytes(), grey([0, 0, 1])),
        "float.tif": (encoded(np.array([[0.0, 0.5, 1.0]], np.float32), "TIFF"), grey([0, 128, 255])),
        "one-pixel.png": (encoded(noise(1, 1)), noise(1, 1)), "wide.png": (encoded(noise(1, 20_000)), noise(1, 20_000)),
        "tall.png": (encoded(noise(20_000, 1)), noise(20_000, 1)), "array.npy": (npy(array), array),
        "grey.npy": (npy(array[..., 0]), np.repeat(array[..., :1], 3, -1)), "sixteen.npy": (npy(array.astype(np.uint16) * 257), array),
        "fortran.npy": (npy(np.asfortranarray(array)), array),
    }  # fmt: skip
    jpegs = {
        "plain.jpg": encoded(smooth, "JPEG"), "progressive.jpg": encoded(smooth, "JPEG", progressive=True),
        "no-subsampling.jpg": encoded(smooth, "JPEG", subsampling=0), "bad-quality.jpg": encoded(smooth, "JPEG", quality=3),
        "grey.jpg": encoded(Image.fromarray(smooth).convert("L"), "JPEG"), "jpeg-named.png": encoded(smooth, "JPEG"),
        "restarts.jpg": encoded(smooth, "JPEG", restart_marker_blocks=2), "comment.jpg": encoded(smooth, "JPEG", comment=b"x" * 60_000),
        "cmyk.jpg": encoded(Image.fromarray(smooth).convert("CMYK"), "JPEG", quality=100),
        "icc.jpg": encoded(smooth, "JPEG", icc_profile=bytes(200_000)), "one-pixel.jpg": encoded(noise(1, 1), "JPEG"),
        "uneven.jpg": encoded(smooth[:17, :13], "JPEG"),
    }  # fmt: skip
    adobe = bytearray(jpegs["cmyk.jpg"])
    adobe[adobe.index(b"Adobe") + 11] = 2  # the same numbers, now to be read as YCCK
    jpegs["ycck.jpg"] = bytes(adobe)
    found |= {name: (data, by_pillow(data)) for name, data in jpegs.items()}
    plain = jpegs["plain.jpg"]
    for name, data in (
        ("trailing.jpg", plain + b"garbage"),
        ("padded.jpg", plain + bytes(100)),
        ("twice.jpg", plain + plain[:9]),
    ):
        found[name] = (data, by_pillow(plain))
    return found


def turned() -> dict[str, tuple[bytes, Outcome]]:
    """Orientations, and EXIF that is none."""
    smooth, array = photo(), noise()
    found: dict[str, tuple[bytes, Outcome]] = {}
    for number, turn in TURNS.items():
        data = encoded(smooth, "JPEG", exif=oriented(number))
        found[f"exif-{number}.jpg"] = (data, turn(by_pillow(data)))
        found[f"exif-{number}.png"] = (encoded(array, exif=oriented(number)), turn(array))
    found["exif-6.webp"] = (encoded(array, "WEBP", lossless=True, exif=oriented(6)), TURNS[6](array))
    plain = encoded(smooth, "JPEG")
    for name, exif in (
        ("exif-0.jpg", oriented(0)), ("exif-9.jpg", oriented(9)), ("exif-broken.jpg", b"Exif\0\0not a tiff header at all"),
        ("exif-empty.jpg", b"Exif\0\0"), ("exif-loop.jpg", b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        ("exif-far.jpg", b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    ):  # fmt: skip
        found[name] = (encoded(smooth, "JPEG", exif=exif), by_pillow(plain))
    return found


def broken() -> dict[str, tuple[bytes, Outcome]]:
    """What cannot be read, with the cause."""
    array, smooth = noise(60, 60), photo()
    jpeg, png_, noisy, webp = (
        encoded(smooth, "JPEG"),
        encoded(array),
        encoded(noise(200, 200), "JPEG"),
        encoded(noise(200, 200), "WEBP"),
    )
    end = b"\xff\xd9"
    wrong = bytearray(png_)
    wrong[60] ^= 255
    bogus = bytearray(jpeg)
    bogus[jpeg.index(b"\xff\xc4") + 5 : jpeg.index(b"\xff\xc4") + 21] = b"\xff" * 16  # more codes than there can be
    cut = {
        **{f"cut-{share}.jpg": jpeg[: len(jpeg) * share // 100] for share in (10, 50, 99)},
        **{f"cut-{share}.png": png_[: len(png_) * share // 100] for share in (10, 50, 99)},
        "magic.jpg": jpeg[:3], "magic.png": png_[:8], "magic.gif": b"GIF89a", "cut-ended.jpg": half(noisy) + end,
        "cut-progressive.jpg": half(encoded(noise(200, 200), "JPEG", progressive=True)) + end,
        "cut-cmyk.jpg": half(encoded(Image.fromarray(noise(200, 200)).convert("CMYK"), "JPEG")) + end,
        "cut-turned.jpg": half(encoded(smooth, "JPEG", exif=oriented(6))) + end, "cut-padded.jpg": half(noisy) + bytes(len(noisy) // 2),
        "cut.webp": half(webp), "cut.bmp": half(encoded(array, "BMP")), "cut.ppm": half(encoded(array, "PPM")),
        "cut.gif": half(encoded(Image.fromarray(array).convert("P"), "GIF")), "cut.npy": npy(array)[:-10],
        # A header that makes no sense is taken for one that is not whole.
        "depth.png": png(9, 9, depth=3), "no-width.png": png(0, 9), "no-pixels.npy": npy_header("(1000, 1000, 3)"),
    }  # fmt: skip
    none = {
        "text.jpg": b"hello, I am a text file called photo.jpg", "page.jpg": b"<html>404 not found</html>",
        "zip.jpg": b"PK\x03\x04" + bytes(100), "pdf.jpg": b"%PDF-1.7\n" + bytes(100), "zeros.jpg": bytes(5000),
        "gzip.jpg": gzip.compress(jpeg), "utf16.jpg": "hello".encode("utf-16"), "noise.jpg": noise().tobytes(),
        "vector.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "elf.jpg": b"\x7fELF" + bytes(60),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n",
        "pickle.jpg": pickle.dumps({"image": 1}), "windows.jpg": b"MZ" + bytes(60), "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(30),
    }  # fmt: skip
    corrupt = {
        "crc.png": bytes(wrong), "huffman.jpg": bytes(bogus), "shape.npy": npy_header("(-1, 5, 3)") + bytes(90),
        "nested.npy": npy_header("(((((") + bytes(90), "objects.npy": npy_header("(3, 3)", "|O") + bytes(90),
        "floats.npy": npy(np.zeros((3, 3, 3), np.float32)), "empty.npy": npy(np.zeros((0, 5, 3), np.uint8)),
        "header.npy": b"\x93NUMPY\x01\x00garbage", "space.npy": npy_header("(9 6, 7, 3)") + bytes(9999), "four-dims.npy": npy(np.zeros((1, 2, 2, 3), np.uint8)),
    }  # fmt: skip
    large = {
        "bomb.png": png(30_000, 30_000), "larger-bomb.png": png(100_000, 100_000), "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x01\0\0;",
        "bomb.bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99),
        "bomb.ppm": b"P6\n60000 60000\n255\n" + bytes(99), "bomb.jpg": jpeg[: jpeg.index(b"\xff\xc0") + 5] + b"\xff\xff\xff\xff" + jpeg[jpeg.index(b"\xff\xc0") + 9 :],
    }  # fmt: skip
    found: dict[str, tuple[bytes, Outcome]] = {
        "nothing.jpg": (b"", "empty"),
        "channels.npy": (npy(noise(c=5)), "channels"),
    }
    for cause, files in (("truncated", cut), ("not_an_image", none), ("corrupt", corrupt), ("too_large", large)):
        found |= {name: (data, cause) for name, data in files.items()}
    return found
