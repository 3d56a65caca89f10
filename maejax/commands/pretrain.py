"""Train a masked autoencoder on images; the same command again resumes.

examples:
  maejax pretrain ~/photos --workdir=runs/photos
  maejax pretrain --config=configs/pretrain_vit_b16_imagenet.py --workdir=runs/b16 --config.mask.ratio=0.6

The same command again goes on where the run stopped. Every key of the config can be set with --config.KEY=VALUE;
`maejax pretrain --keys` lists them. Exit codes: 0 done, 2 usage, 65 too many bad images, 66 no valid checkpoint,
70 diverged, 71 replicas differ, 74 storage failed, 75 interrupted and saved (run the same command again).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.commands.arguments import (
    Parser,
    parse_training,
    prepare_libraries,
    print_keys,
    split_config_flags,
    train_in_place,
)
from maejax.errors import UsageError
from maejax.overrides import override


def run(arguments: Sequence[str]) -> int | None:
    """maejax pretrain."""
    options, file, assignments = parse(arguments)
    if options.keys:
        print_keys(override(configs.load(file) if file else configs.default(), assignments))
        return None

    from maejax.prepare import plan  # JAX is imported only once the command makes sense

    prepare_libraries()
    notes: tuple[str, ...] = ()
    if file is not None:
        config = override(configs.load(file), assignments)
    else:
        if options.fake_processes or options.place.num_processes > 1:
            raise UsageError("several processes need --config=RECIPE: a run chosen for this machine suits one process")
        config, notes = _config_for_folder(options.data, options.workdir, assignments)
    planned = plan(config, options.workdir, start_from=options.start_from, notes=notes)
    return train_in_place("pretrain", arguments, options, planned)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, str | None, dict[str, str]]:
    """The options, with the run's folder in `workdir`; the recipe; and what is set of its keys."""
    file, assignments, others = split_config_flags(arguments)
    parser = Parser("pretrain", __doc__)
    parser.add_argument("data", nargs="?", help="images: a folder, digits, tfds:NAME or arrayrecord:GLOB")
    parser.add_argument("--workdir", "--out", type=Path, help="folder of the run (default: runs/ and the data's name)")
    parser.add_argument("--from", dest="start_from", type=Path, metavar="RUN", help="start from another run's weights")
    options = parse_training(parser, others, assignments)
    if options.data is None and file is None and not options.keys:
        raise UsageError("say what to train on: maejax pretrain FOLDER, or --config=RECIPE; see maejax pretrain --help")
    if options.data is not None and file is not None:
        assignments.setdefault("data.source", options.data)
    if options.workdir is None and not options.keys:
        name = Path(file).stem if file else Path(options.data.rpartition(":")[2]).expanduser().absolute().name
        options.workdir = Path("runs") / name
    return options, file, assignments


def config_before_data(
    options: argparse.Namespace, file: str | None, assignments: dict[str, str], *, here: bool
) -> ConfigDict | None:
    """The config as far as it is known without a look at images: None where they decide. For `maejax launch`."""
    if file is not None:
        return override(configs.load(file), assignments)
    override(configs.default(), assignments)  # mistakes in keys
    return None


def _config_for_folder(data: str, workdir: Path, assignments: dict[str, str]) -> tuple[ConfigDict, tuple[str, ...]]:
    """What to do with images and nothing else: what the run does already, or what suits images and machine."""
    from maejax.data.scan import scan
    from maejax.data.sources import make_source
    from maejax.suggest import reasons, suggest, with_warmup
    from maejax.workdir import check_workdir, stored_config

    check_workdir(workdir)
    wanted = override(configs.default(), assignments)  # mistakes in keys come out before images are read
    source = make_source(data, split=wanted.data.split, data_dir=wanted.data.dir)
    found = scan(source, max_pixels=wanted.data.max_pixels)
    spec = str(Path(data).expanduser().absolute()) if Path(data).expanduser().is_dir() else data
    stored = stored_config(workdir)
    if stored is not None:
        return override(stored, {"data.source": spec} | assignments), tuple(found.lines())

    import jax

    facts: dict[str, Any] = {
        "num_images": len(source),
        "median_side": found.median_side,
        "platform": jax.default_backend(),
    }
    config = suggest(source=spec, num_devices=jax.device_count(), **facts)
    config = with_warmup(override(config, assignments), len(source))
    return config, (*found.lines(), *reasons(config, **facts))
