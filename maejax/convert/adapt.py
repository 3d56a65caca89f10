"""An encoder's arrays for images of another size, other patches, or another number of channels. Plain numpy.

Positions are resampled as the official fine-tuning code does it: bicubic (a = -0.75, as torch has it), the corners not
aligned, the class token's row kept. Patch kernels are resampled so that a patch, resized with the
image, gives the same token as before, as nearly as can be: the pseudo-inverse resize of FlexiViT (Beyer et al. 2023,
section 3.4), with the antialiased bicubic (a = -0.5) that images are resized with. Channels are summed for one,
else repeated in turn and rescaled so that a grey image gives the same token, as timm does.
"""

import numpy as np

Size = tuple[int, int]


def resample_positions(table: np.ndarray, old: Size, new: Size, *, cls_token: bool) -> np.ndarray:
    """(1 [1+]n d) of a grid of `old` rows and columns -> (1 [1+]n' d) of `new`; the class token's row is kept."""
    extra, d = int(cls_token), table.shape[-1]
    if table.shape[1] != extra + old[0] * old[1]:
        raise ValueError(f"a table with {table.shape[1]} rows is not one of {old[0]}x{old[1]} patches")
    if old == new:
        return table
    grid = table[0, extra:].reshape(*old, d).astype(np.float64)
    rows, columns = (cubic_matrix(a, b) for a, b in zip(old, new, strict=True))
    resampled = np.einsum("ij,kl,jld->ikd", rows, columns, grid, optimize=True).reshape(1, -1, d)
    return np.concatenate([table[:, :extra], resampled.astype(table.dtype)], axis=1)


def resample_patches(kernel: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """(p*q*c d) -> (p'*q'*c d)."""
    if old == new:
        return kernel
    c, d = kernel.shape[0] // (old[0] * old[1]), kernel.shape[1]
    # With B the resize from old to new patches: <x, w> = <B x, w'> for all x, solved by w' = pinv(B^T) w.
    rows, columns = (np.linalg.pinv(antialiased_matrix(a, b).T) for a, b in zip(old, new, strict=True))
    grid = kernel.reshape(*old, c, d).astype(np.float64)
    resampled = np.einsum("ij,kl,jlcd->ikcd", rows, columns, grid, optimize=True)
    return resampled.reshape(new[0] * new[1] * c, d).astype(kernel.dtype)


def adapt_channels(kernel: np.ndarray, old: int, new: int) -> np.ndarray:
    """(p*q*c d) -> (p*q*c' d)."""
    if old == new:
        return kernel
    split = kernel.reshape(-1, old, kernel.shape[1])
    if new == 1:
        adapted = split.sum(axis=1, keepdims=True)
    else:
        adapted = split[:, np.arange(new) % old] * np.float32(old / new)
    return np.ascontiguousarray(adapted.reshape(-1, kernel.shape[1]), kernel.dtype)


def cubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The bicubic interpolation of one axis as a matrix (new old); places beyond an edge take the edge's value."""
    center = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(center).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        weight = _cubic(center - (first + tap), a)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix


def antialiased_matrix(old: int, new: int, a: float = -0.5) -> np.ndarray:
    """The resize of one axis as Pillow does it, a matrix (new old): when shrinking, the filter is as wide as needed."""
    scale = max(old / new, 1.0)
    center = (np.arange(new) + 0.5) * old / new - 0.5
    weight = _cubic((np.arange(old)[None] - center[:, None]) / scale, a)
    return weight / weight.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
