"""What is in a source of images, told to people before a run starts."""

import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from maejax.data.decode import BadImage, decode, header
from maejax.data.sources import Source
from maejax.data.transforms import read_record
from maejax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """What was found. Sizes are (height, width)."""

    total: int
    looked_at: int
    formats: dict[str, int]
    sizes: np.ndarray  # int (n 2)
    unreadable: tuple[tuple[str, str], ...]  # (name, cause)

    @property
    def median_side(self) -> int:
        """Of the images' shorter sides, in pixels."""
        return int(np.median(self.sizes.min(axis=1)))

    def lines(self) -> list[str]:
        """For people."""
        formats = ", ".join(f"{number:,} {name}" for name, number in sorted(self.formats.items(), key=lambda f: -f[1]))
        sampled = f", of which {self.looked_at:,} were looked at" if self.looked_at < self.total else ""
        by_area = self.sizes[np.argsort(self.sizes.prod(axis=1), kind="stable")]
        small, median, large = (f"{w}x{h}" for h, w in by_area[[0, len(by_area) // 2, -1]])
        lines = [
            f"found {self.total:,} images{sampled} ({formats})",
            f"sizes (w x h): smallest {small}, median {median}, largest {large}",
        ]
        if self.unreadable:
            causes = Counter(cause for _, cause in self.unreadable)
            listed = ", ".join(f"{number} {cause}" for cause, number in causes.most_common())
            first = ", ".join(name for name, _ in self.unreadable[:3]) + (", ..." if len(self.unreadable) > 3 else "")
            lines.append(f"unreadable: {len(self.unreadable)} ({listed}): {first}; others take their places")
        return lines


def scan(source: Source, *, max_pixels: int, channels: int = 3, limit: int = 10_000) -> Scan:
    """Reads the headers of all records, or of `limit` evenly spaced ones.

    Raises:
      UsageError: not one of them is a readable image.
    """
    total = len(source)
    indices = np.unique(np.linspace(0, total - 1, min(total, limit)).astype(np.int64))

    def look(index: int) -> tuple[str, int, int] | str:
        try:
            image = read_record(source, int(index))["image"]
            if channels not in (1, 3, 4):  # which few images have
                decode(image, channels=channels, max_pixels=max_pixels)
            if isinstance(image, np.ndarray):
                return "array", image.shape[0], image.shape[1]
            form, height, width = header(image)
            if height * width > max_pixels:
                return "too_large"
            if total <= 1000 and form != "NPY":  # few enough to find those that are cut off, too
                decode(image, channels=3, max_pixels=max_pixels)
            return form, height, width
        except BadImage as error:
            return error.cause

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(look, indices))
    good = [result for result in results if not isinstance(result, str)]
    bad = tuple(
        (source.name(int(i)), cause) for i, cause in zip(indices, results, strict=True) if isinstance(cause, str)
    )
    if not good:
        causes = ", ".join(f"{number} {cause}" for cause, number in Counter(cause for _, cause in bad).most_common())
        raise UsageError(f"none of the {total} image files can be read ({causes}); the first is {bad[0][0]}")
    return Scan(
        total=total,
        looked_at=len(indices),
        formats=dict(Counter(form for form, _, _ in good)),
        sizes=np.array([(height, width) for _, height, width in good]),
        unreadable=bad,
    )
