"""Resizing against Pillow called directly; decoding in part against Pillow's whole decode, crop and resize."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image

from maejax.data import resize as module
from maejax.data.decode import BadImage, decode
from maejax.data.masking import Mask
from maejax.data.partial import decode_part
from maejax.data.pipeline import train_batches
from maejax.data.resize import resize, resize_box
from maejax.data.transforms import Augment, LoadImage, crop_resize, random_box

LIMITS = dict(channels=3, max_pixels=10**8)
PHOTO = load_sample_image("china.jpg")  # 427 x 640, in scikit-learn


def pillow(image, box, size=(224, 224)):
    """torchvision on Pillow: img.crop(...).resize(size, BICUBIC)."""
    top, left, h, w = box
    picture = Image.fromarray(image).crop((left, top, left + w, top + h))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def difference(left, right):
    return np.abs(left.astype(int) - right).mean()


def jpeg(image, quality=92, subsampling=0, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling, **options)
    return file.getvalue()


def boxes(count, height, width):
    rng = np.random.default_rng(count)
    return [random_box(height, width, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(count)]


# ---- Resize ---------------------------------------------------------------------------------------------------------


def test_photographs_are_resized_as_by_pillow():
    differences = [difference(crop_resize(PHOTO, box, (224, 224)), pillow(PHOTO, box)) for box in boxes(20, 427, 640)]
    assert max(differences) <= 0.5  # of 255; the promise is 1


@pytest.mark.parametrize("shape", [(50, 70), (5, 3), (1, 90), (300, 20), (1, 1)])
@pytest.mark.parametrize("size", [(16, 24), (96, 128)])
def test_noise_is_resized_as_by_pillow(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert difference(resize(noise, size), pillow(noise, (0, 0, *shape), size)) <= 1


def test_what_fits_comes_back_and_what_is_flat_stays_flat():
    assert resize(PHOTO, (427, 640)) is PHOTO
    flat = np.full((37, 91, 3), (3, 130, 252), np.uint8)
    assert (resize(flat, (50, 50)) == (3, 130, 252)).all()


def test_every_kind_of_cpu_gives_the_same_bits():
    simd = pytest.importorskip("cykooz_resizer")
    bicubic = simd.ResizeOptions(simd.ResizeAlg.convolution(simd.FilterType.catmull_rom), use_alpha=False)
    found = set()
    for extensions in (simd.CpuExtensions.none, simd.CpuExtensions.sse4_1, simd.CpuExtensions.avx2):
        resizer, target = simd.Resizer(), simd.ImageData(224, 224, simd.PixelType.U8x3)
        try:
            resizer.cpu_extensions = extensions
        except Exception:  # a CPU that has none of these
            continue
        resizer.resize(simd.ImageData(640, 427, simd.PixelType.U8x3, PHOTO.tobytes()), target, bicubic)
        found.add(target.get_buffer())
    assert found == {resize(PHOTO, (224, 224)).tobytes()}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_without_the_wheel_pillow_does_it(monkeypatch, channels):
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, channels), dtype=np.uint8)
    fast = resize(noise, (24, 24))
    monkeypatch.setattr(module, "simd", None)
    slow = resize(noise, (24, 24))
    for c in range(channels):
        plane = Image.fromarray(noise[..., c]).resize((24, 24), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(slow[..., c], np.asarray(plane))
    assert slow.shape == fast.shape and difference(fast, slow) <= 1


# ---- Decoding in part -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2])  # 4:4:4, 4:2:2, 4:2:0
def test_parts_are_what_the_whole_would_give(subsampling):
    image = jpeg(PHOTO, subsampling=subsampling)
    decoded = np.asarray(Image.open(io.BytesIO(image)))
    for box in [*boxes(20, 427, 640), (0, 0, 427, 640), (0, 0, 1, 1), (426, 639, 1, 1), (400, 0, 27, 30)]:
        size = (max(box[2] // 2, 1) * 2, max(box[3] // 2, 1) * 2)  # no smaller, so that no pixels are left out
        pixels, found = decode_part(image, lambda *_, box=box: box, size, **LIMITS)
        top, left, h, w = (int(side) for side in found)
        assert (top, left, h, w) == box
        np.testing.assert_array_equal(pixels[top : top + h, left : left + w], decoded[top : top + h, left : left + w])
        assert difference(resize_box(pixels, found, size), pillow(decoded, box, size)) <= 0.5


@pytest.mark.parametrize("size", [(200, 200), (120, 100), (60, 60), (30, 40), (9, 9)])
def test_large_crops_are_decoded_small(size):
    image = jpeg(PHOTO)
    for box in boxes(8, 427, 640):
        pixels, found = decode_part(image, lambda *_, box=box: box, size, **LIMITS)
        assert difference(resize_box(pixels, found, size), pillow(PHOTO, box, size)) <= 4  # a busy photograph
    if size[0] <= 60:
        assert pixels.shape[1] <= 320


def test_the_error_of_fast_on_imagenet_is_what_the_documentation_says(shared_data):
    differences = []
    for number, path in enumerate(sorted((shared_data / "imagenet-sample").iterdir())[::5]):
        image = path.read_bytes()
        decoded = np.asarray(Image.open(path).convert("RGB"))
        box = random_box(*decoded.shape[:2], np.random.default_rng(number), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
        pixels, found = decode_part(image, lambda *_, box=box: box, (224, 224), **LIMITS)
        differences.append(difference(resize_box(pixels, found, (224, 224)), pillow(decoded, box)))
    assert np.mean(differences) <= 2


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif.tobytes())


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "make",
    [turned, png, lambda image: jpeg(image, progressive=True), lambda image: image, lambda i: jpeg(i) + b"x" * 99],
)
def test_what_is_no_plain_jpeg_is_decoded_whole(make):
    image = make(PHOTO[:60, :80])
    seen = []

    def draw(height, width):
        seen.append((height, width))
        return 2, 3, 20, 30

    pixels, box = decode_part(image, draw, (8, 8), **LIMITS)
    whole = decode(image, **LIMITS)
    np.testing.assert_array_equal(pixels, whole)
    assert box == (2, 3, 20, 30) and seen == [whole.shape[:2]]


def test_grey_images_and_grey_channels():
    grey = jpeg(PHOTO[..., 0], subsampling=-1)
    pixels, _ = decode_part(grey, lambda h, w: (0, 0, h, w), (427, 640), **LIMITS)
    np.testing.assert_array_equal(pixels, decode(grey, **LIMITS))
    pixels, _ = decode_part(jpeg(PHOTO), lambda h, w: (0, 0, h, w), (427, 640), channels=1, max_pixels=10**8)
    assert pixels.shape == (427, 640, 1)


def test_damage_is_found_above_the_lower_edge_of_the_crop():
    image = bytearray(jpeg(PHOTO))
    image[len(image) // 4 : len(image) // 4 + 2] = b"\xff\xd9"  # the end, too early
    with pytest.raises(BadImage, match="truncated"):
        decode_part(bytes(image), lambda h, w: (h // 2, 0, h // 2, w), (64, 64), **LIMITS)
    below, _ = decode_part(bytes(image), lambda h, w: (0, 0, h // 10, w), (42, 640), **LIMITS)
    np.testing.assert_array_equal(below[:42], decode(jpeg(PHOTO), **LIMITS)[:42])


@pytest.mark.parametrize("cause", ["truncated", "too_large", "empty", "not_an_image"])
def test_causes_are_those_of_the_whole(cause):
    image = {"truncated": jpeg(PHOTO)[:-5000], "empty": b"", "not_an_image": b"hello"}.get(cause, jpeg(PHOTO))
    with pytest.raises(BadImage) as error:
        most = 1000 if cause == "too_large" else 10**8
        decode_part(image, lambda h, w: (0, 0, h, w), (9, 9), channels=3, max_pixels=most)
    assert error.value.cause == cause


class Photos:
    """One photograph, again and again."""

    num_classes = None

    def __init__(self):
        self.image = jpeg(PHOTO)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": self.image if index != 7 else b"broken"}

    def name(self, index):
        return f"{index}.jpg"


def test_fast_crops_are_drawn_from_the_same_distribution():
    augment = Augment(size=(24, 24))
    load = LoadImage(source=Photos(), part=augment, **LIMITS)
    drawn = np.array([load(0, np.random.default_rng(seed))["box"] for seed in range(300)])
    drawn = drawn[:, 2] / drawn[:, 3]
    plain = np.array([h / w for _, _, h, w in boxes(3000, 427, 640)])
    assert stats.ks_2samp(drawn, plain).pvalue > 0.01


def test_fast_batches_are_a_function_of_seed_and_step():
    def batches(start, **options):
        transforms = [Augment(size=(24, 24)), Mask(sampler="random", grid=(3, 3), visible=2)]
        stream = iter(train_batches(Photos(), transforms, batch_size=8, seed=3, start_step=start, fast=True,
                                    **LIMITS, **options))  # fmt: skip
        return [next(stream) for _ in range(6 - start)]

    first, again = batches(0), batches(4)
    for left, right in zip(first[4:], again, strict=True):
        assert left.keys() == right.keys() == {"image", "visible", "masked", "index", "faults"}
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    assert (np.concatenate([batch["faults"] for batch in first])[:, 0] == 7 * 16 + 2).sum() == 1  # not_an_image


@pytest.mark.parametrize("box", [(10.5, 20.25, 50, 70.5), (0, 0, 213.5, 320), (400.125, 600.5, 26.875, 39.5)])
@pytest.mark.parametrize("wheel", [True, False])
def test_boxes_may_begin_and_end_inside_of_pixels(box, wheel, monkeypatch):
    if not wheel:
        monkeypatch.setattr(module, "simd", None)
    top, left, h, w = box
    whole = Image.fromarray(PHOTO)
    expected = whole.resize((30, 20), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    assert difference(resize_box(PHOTO, box, (20, 30)), np.asarray(expected)) <= 2  # that looks outside of the box
