"""Train a classifier, from another run's encoder or from scratch: everything, the last blocks, or a linear probe.

examples:
  maejax finetune --from=runs/photos --workdir=runs/photos-ft
  maejax finetune --config=configs/finetune_vit_b16_imagenet.py --from=runs/b16 --workdir=runs/b16-ft
  maejax finetune --config=configs/finetune_vit_b16_imagenet.py --from=runs/b16 --config.finetune.blocks=4
  maejax finetune --config=configs/probe_vit_b16_imagenet.py --from=runs/b16 --workdir=runs/b16-probe
  maejax finetune --config=configs/scratch_vit_b16_imagenet.py --workdir=runs/scratch

With --from the encoder's shape is that run's; without a recipe, so are its images. The same command again resumes.
Every key can be set with --config.KEY=VALUE; `maejax finetune --keys` lists them. Exit codes and --supervise are those
of `maejax pretrain`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.commands.arguments import (
    Parser,
    attended,
    parse_training,
    prepare_libraries,
    print_keys,
    split_config_flags,
    train_in_place,
    under_supervision,
)
from maejax.errors import UsageError
from maejax.overrides import override
from maejax.suggest import finetuning, with_encoder_of


def run(arguments: Sequence[str]) -> int | None:
    """maejax finetune."""
    options, file, assignments = parse(arguments)
    config, notes = config_for(file, options.start_from, assignments, adapt=options.adapt)
    if options.keys:
        print_keys(config)
        return None
    if options.supervise:
        return under_supervision("finetune", arguments, options.workdir)
    with attended(options):
        from maejax.prepare import plan  # JAX is imported only once the command makes sense

        prepare_libraries()
        planned = plan(config, options.workdir, start_from=options.start_from, adapt=options.adapt, notes=notes)
        return train_in_place("finetune", arguments, options, planned)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, str | None, dict[str, str]]:
    """The options, with the run's folder in `workdir`; the recipe; and what is set of its keys."""
    file, assignments, others = split_config_flags(arguments)
    parser = Parser("finetune", __doc__)
    parser.add_argument(
        "data", nargs="?", help="labelled images: a folder with a subfolder a class, digits, tfds:NAME ..."
    )
    parser.add_argument(
        "--workdir", "--out", type=Path, help="folder of the run (default: runs/ and the recipe's name)"
    )
    parser.add_argument("--from", dest="start_from", type=Path, metavar="RUN", help="start from this run's encoder")
    parser.add_argument(
        "--adapt", action="store_true", help="fit the weights to other image sizes, channels or classes"
    )
    options = parse_training(parser, others, assignments)
    if file is None and options.start_from is None:
        raise UsageError("say what to start from: --from=RUN, or --config=RECIPE; see maejax finetune --help")
    if options.data is not None:
        assignments.setdefault("data.source", options.data)
    name = Path(file).stem if file else f"{options.start_from.absolute().name}-finetuned"
    options.workdir = options.workdir or Path("runs") / name
    return options, file, assignments


def config_before_data(
    options: argparse.Namespace, file: str | None, assignments: dict[str, str], *, here: bool
) -> ConfigDict | None:
    """The config without a look at images; None where a run elsewhere decides it. For `maejax launch`."""
    if here:
        return config_for(file, options.start_from, assignments, adapt=options.adapt)[0]
    if file is not None:
        return config_for(file, None, assignments, adapt=options.adapt)[0]
    override(configs.default(), assignments)  # mistakes in keys
    return None


def config_for(
    file: str | None, start_from: Path | None, assignments: dict[str, str], *, adapt: bool = False
) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config of a recipe, or one that suits the run that it starts from; and what is to be said of it."""
    from maejax.workdir import stored_config

    before = stored_config(start_from) if start_from else None
    if start_from and before is None:
        raise UsageError(f"--from={start_from} is not a run of maejax: it has no config.json")
    if file is None:
        assert before is not None
        return override(finetuning(before), assignments), ()
    config = configs.load(file)
    if config.objective != "classify":
        raise UsageError(f"{file} is a recipe for objective={config.objective}, not for classify; use maejax pretrain")
    if before is None:
        return override(config, assignments), ()
    note = f"encoder   of {start_from}: ViT-{before.model.size} with patches of {configs.pair(before.model.patch)}"
    return override(with_encoder_of(config, before, adapt=adapt), assignments), (note,)
