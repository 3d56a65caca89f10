"""Pictures of original | masked | reconstruction, with nothing in the reconstruction that the network was not shown.

A network that regresses normalised patches says nothing of a hidden patch's brightness and contrast. The column
"reconstruction" takes these from the visible patches around it. The usual pictures take them from the hidden patch
itself, which shows details that the network cannot know; that variant has its own column, labelled as what it is.
"""

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

EPS = 1e-6  # of the target's variance
GREY = 118  # of hidden patches
SHORTEST = 112  # pixels of an image's shorter side, at least
PAD = 4  # pixels between images
HEADER = 18  # pixels of text above a column
TITLES = ("original", "masked", "reconstruction", "uses the true patch's mean and std")  # of columns, from the left


def to_patches(images: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """(b h w c) -> float32 (b n p*q*c), in the order of the model's patches."""
    p, q = patch
    return rearrange(images.astype(np.float32), "b (r p) (s q) c -> b (r s) (p q c)", p=p, q=q)


def to_images(patches: np.ndarray, patch: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(b n p*q*c) -> uint8 (b h w c), clipped to [0, 255]."""
    p, q = patch
    images = rearrange(patches, "b (r s) (p q c) -> b (r p) (s q) c", p=p, q=q, r=size[0] // p, s=size[1] // q)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def nearby_statistics(
    patches: np.ndarray, visible: np.ndarray, masked: np.ndarray, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation for every masked patch, (b m 1) each, guessed from the visible ones.

    They are averages over the visible patches, weighted by the inverse square of the distance between the patches.
    """

    def places(indices: np.ndarray) -> np.ndarray:
        return np.stack([indices // columns, indices % columns], axis=-1).astype(np.float32)

    seen = np.take_along_axis(patches, visible[:, :, None], axis=1)
    mean, std = seen.mean(-1, keepdims=True), np.sqrt(seen.var(-1, keepdims=True, ddof=1) + EPS)
    distance = np.square(places(masked)[:, :, None] - places(visible)[:, None]).sum(-1)  # b m v
    weights = 1 / distance
    weights /= weights.sum(-1, keepdims=True)
    return weights @ mean, weights @ std


def reconstruct(
    images: np.ndarray,
    visible: np.ndarray,
    masked: np.ndarray,
    predicted: np.ndarray,
    *,
    patch: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> dict[str, np.ndarray]:
    """The columns of a picture by title, each uint8 (b h w c).

    Args:
      images: uint8 (b h w c).
      visible, masked: (b v) and (b m) indices of patches.
      predicted: (b m p*q*c), what the network says in the units of its target.
      mean, std: the normalisation of pixels in [0, 1].
      norm_pix: whether the target was normalised per patch.
    """
    size = images.shape[1:3]
    scale, shift = np.asarray(std, np.float32) * 255, np.asarray(mean, np.float32) * 255
    pixels = to_patches((images.astype(np.float32) - shift) / scale, patch)

    def paste(values: np.ndarray) -> np.ndarray:
        full = pixels.copy()
        np.put_along_axis(full, masked[:, :, None], values, axis=1)
        colored = rearrange(full, "b n (x c) -> b n x c", c=images.shape[-1]) * scale + shift
        return to_images(rearrange(colored, "b n x c -> b n (x c)"), patch, size)

    hidden = to_patches(images, patch)
    np.put_along_axis(hidden, masked[:, :, None], np.float32(GREY), axis=1)
    columns = [images, to_images(hidden, patch, size)]
    if not norm_pix:
        return dict(zip(TITLES, [*columns, paste(predicted)]))
    near_mean, near_std = nearby_statistics(pixels, visible, masked, size[1] // patch[1])
    true = np.take_along_axis(pixels, masked[:, :, None], axis=1)
    true_mean, true_std = true.mean(-1, keepdims=True), np.sqrt(true.var(-1, keepdims=True, ddof=1) + EPS)
    columns += [paste(predicted * near_std + near_mean), paste(predicted * true_std + true_mean)]
    return dict(zip(TITLES, columns))


def _enlarged(h: int, w: int, shortest: int) -> tuple[int, int]:
    zoom = max(1, -(-shortest // min(h, w)))
    return h * zoom, w * zoom


def tiles(picture: np.ndarray, size: tuple[int, int], *, shortest: int = SHORTEST) -> np.ndarray:
    """What `grid` has put together, taken apart: uint8 (h w 3) -> (rows columns h w 3), as enlarged.

    Args:
      picture: the pixels of a `grid`.
      size: height and width of the images that it was made of.

    Raises:
      ValueError: it is no grid of such images.
    """
    h, w = _enlarged(*size, shortest)
    rows, (columns, rest) = (picture.shape[0] - HEADER - PAD) // (h + PAD), divmod(picture.shape[1] - PAD, w + PAD)
    if rest or rows < 1 or columns < 1:
        raise ValueError(f"a picture of {picture.shape[1]}x{picture.shape[0]} is no grid of images of {w}x{h}")
    top = picture.shape[0] - PAD - rows * (h + PAD)  # titles may take several lines
    inner = picture[top : top + rows * (h + PAD), PAD : PAD + columns * (w + PAD)]
    return rearrange(inner, "(r h) (s w) c -> r s h w c", r=rows, s=columns)[:, :, :h, :w]


def grid(columns: dict[str, np.ndarray], *, caption: str = "", shortest: int = SHORTEST) -> Image.Image:
    """One row an image, one titled column a variant; images smaller than `shortest` pixels are enlarged."""
    b, original_h, original_w, _ = next(iter(columns.values())).shape
    h, w = _enlarged(original_h, original_w, shortest)
    font = ImageFont.load_default(11)
    top = HEADER * 2 if caption else HEADER
    # A long title may take two lines rather than be cut off.
    titles = {title: _wrap(title, w, font) for title in columns}
    top += 12 * (max(text.count("\n") for text in titles.values()))
    sheet = Image.new("RGB", (len(columns) * (w + PAD) + PAD, top + b * (h + PAD) + PAD), "white")
    draw = ImageDraw.Draw(sheet)
    if caption:
        draw.text((PAD, 3), caption, fill="black", font=font)
    for column, (title, images) in enumerate(columns.items()):
        x = PAD + column * (w + PAD)
        draw.multiline_text((x, HEADER if caption else 3), titles[title], fill="black", font=font, spacing=1)
        for row in range(b):
            tile = Image.fromarray(as_rgb(images[row])).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, top + row * (h + PAD)))
    return sheet


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(h w c) -> (h w 3) for the eye: grey repeated, of more than three channels the first three."""
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else np.ascontiguousarray(image[..., :3])


def _wrap(title: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
