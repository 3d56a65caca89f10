"""Prepare images: pack them into shards that are read and decoded several times as fast.

examples:
  maejax data pack ~/imagenet/train packed/train --size=256
  maejax data pack tfds:imagenet2012 packed/train --split=train --workers=32
  maejax pretrain packed/train --workdir=runs/packed

`pack SRC DST` writes ArrayRecord files of images whose shorter side is at most --size, as JPEG; smaller images stay as
they are. Labels are kept; what cannot be read is left out and listed in DST/bad_images.jsonl. Killed? The same command
again writes the shards that are missing. Crops come from the smaller images: a run on a pack is not a run on SRC.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from maejax.commands.arguments import Parser
from maejax.errors import UsageError


def run(arguments: Sequence[str]) -> None:
    """maejax data."""
    parser = Parser("data", __doc__)
    parser.add_argument("action", choices=["pack"], metavar="pack", help="what to do: pack")
    parser.add_argument("source", metavar="SRC", help="images: a folder, digits, tfds:NAME or arrayrecord:GLOB")
    parser.add_argument("folder", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the shorter side (default: 256)")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of the JPEGs, 1 to 100 (default: 90)")
    parser.add_argument("--channels", type=int, default=3, metavar="C", help="3 for RGB, 1 for grey (default: 3)")
    parser.add_argument("--split", default="train", help="of sources that have splits (default: train)")
    parser.add_argument("--data-dir", metavar="DIR", help="where TFDS data lives")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, metavar="N", help="larger images are left out")
    parser.add_argument("--workers", type=int, metavar="W", help="processes (default: one for each core)")
    options = parser.parse_args(arguments)
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    for name, value, least, most in (
        ("size", options.size, 16, 65_500), ("quality", options.quality, 1, 100), ("workers", workers, 1, 1024),
        ("max-pixels", options.max_pixels, 1, 10**12),
    ):  # fmt: skip
        if not least <= value <= most:
            raise UsageError(f"--{name}={value} must lie between {least} and {most}")
    if options.channels not in (1, 3):
        raise UsageError(f"--channels={options.channels} must be 1 or 3: JPEG holds no other number")

    from maejax.data.pack import Packing, pack
    from maejax.data.sources import make_source
    from maejax.workdir import lock

    source = make_source(options.source, split=options.split, data_dir=options.data_dir)
    packing = Packing(
        source=source, folder=options.folder, size=options.size, quality=options.quality, channels=options.channels,
        max_pixels=options.max_pixels,
    )  # fmt: skip
    print(f"packing   {len(source):,} images into {options.folder}, {packing.shards()} shards", flush=True)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{options.folder} cannot be made: {error.strerror}") from error
    with lock(options.folder):
        manifest = pack(packing, workers=workers, say=lambda line: print(line, flush=True))
    print(f"packed    {manifest['images']:,} images, {manifest['bytes'] / 1e6:,.1f} MB, content {manifest['content']}")
    if manifest["bad_images"]:
        causes = ", ".join(f"{number} {cause}" for cause, number in manifest["bad_images"].items())
        print(f"left out  {sum(manifest['bad_images'].values())} ({causes}); see {options.folder}/bad_images.jsonl")
    print(f"use it    maejax pretrain {options.folder}")
