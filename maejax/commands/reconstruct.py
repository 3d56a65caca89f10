"""Draw original | masked | reconstruction of a run's images or yours.

examples:
  maejax reconstruct runs/photos
  maejax reconstruct runs/photos cat.jpg dog.png --out=grid.png --mask-ratio=0.9
"""

import os
from collections.abc import Sequence
from pathlib import Path

from maejax.commands.arguments import Parser, prepare_libraries
from maejax.errors import UsageError
from maejax.overrides import override


def run(arguments: Sequence[str]) -> None:
    """maejax reconstruct."""
    parser = Parser("reconstruct", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("images", nargs="*", type=Path, help="image files (default: some of the run's data)")
    parser.add_argument(
        "--out", type=Path, default=Path("reconstruction.png"), help="the picture (default: %(default)s)"
    )
    parser.add_argument("--mask-ratio", help="share of hidden patches (default: the run's)")
    parser.add_argument("--sampler", help="random, block or grid (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        raise UsageError(f"--seed={options.seed} must be at least 0")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or options.out.is_dir():
        raise UsageError(f"--out={options.out} must be a file that ends in .png, .jpg or .webp")

    from maejax import build, runs
    from maejax.check import check
    from maejax.data.decode import BadImage, decode
    from maejax.data.files import read_image_file

    prepare_libraries()
    c, objective, weights = runs.load_objective(options.run)
    if getattr(objective, "predict", None) is None:
        raise UsageError(f"{options.run} has objective={c.objective}, which reconstructs nothing that can be shown")
    asked = {"mask.ratio": options.mask_ratio, "mask.sampler": options.sampler}
    c = override(c, {key: value for key, value in asked.items() if value is not None})
    check(c)
    build.check_names(c)
    if options.images:
        for path in options.images:  # say which file is wrong before anything is computed
            try:
                decode(read_image_file(path), channels=c.data.channels, max_pixels=c.data.max_pixels)
            except (OSError, BadImage) as error:
                raise UsageError(f"{path} is not an image that can be read: {error}") from error
        images = runs.images_of_files(c, options.images)
    else:
        images = runs.preview_images(c)
    if not os.access(options.out.absolute().parent, os.W_OK):
        raise UsageError(f"--out={options.out}: its folder does not exist or cannot be written to")
    caption = f"{options.run}, {c.mask.sampler} mask {c.mask.ratio:g}"
    runs.Painter(c, objective, images, seed=options.seed).draw(weights, options.out, caption)
    print(f"picture of {len(images)} images: {options.out}")
