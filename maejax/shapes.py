"""Numbers of patches and pixels: what follows from an image's size, its patches and its mask."""

import dataclasses

from maejax.data.masking import num_decoded, num_visible


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes that follow from a config."""

    image: tuple[int, int]  # height, width
    patch: tuple[int, int]
    channels: int
    ratio: float  # of hidden patches
    subset: float = 1.0  # of them, what is decoded

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def patches(self) -> int:
        """n."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """v."""
        return num_visible(self.patches, self.ratio)

    @property
    def decoded(self) -> int:
        """m: masked patches that are predicted in training, all of them unless there is a subset."""
        return num_decoded(self.patches - self.visible, self.subset)

    @property
    def pixels(self) -> int:
        """Of one patch, times channels."""
        return self.patch[0] * self.patch[1] * self.channels
