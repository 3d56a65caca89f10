"""Train a classifier, from another run's encoder or from scratch: everything, the last blocks, or a linear probe.

examples:
  maejax finetune --from=runs/photos --workdir=runs/photos-ft
  maejax finetune --config=configs/finetune_vit_b16_imagenet.py --from=runs/b16 --workdir=runs/b16-ft
  maejax finetune --config=configs/finetune_vit_b16_imagenet.py --from=runs/b16 --config.finetune.blocks=4
  maejax finetune --config=configs/probe_vit_b16_imagenet.py --from=runs/b16 --workdir=runs/b16-probe
  maejax finetune --config=configs/scratch_vit_b16_imagenet.py --workdir=runs/scratch

With --from the encoder's shape is that run's; without a recipe, so are its images. The same command again resumes.
Every key can be set with --config.KEY=VALUE; `maejax finetune --keys` lists them.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.commands.arguments import Parser, parse_training, print_keys, quieten_libraries, split_config_flags
from maejax.errors import UsageError
from maejax.overrides import override
from maejax.suggest import finetuning, with_encoder_of


def run(arguments: Sequence[str]) -> None:
    """maejax finetune."""
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
    config, notes = config_for(file, options.start_from, assignments, adapt=options.adapt)
    if options.keys:
        print_keys(config)
        return
    name = Path(file).stem if file else f"{options.start_from.absolute().name}-finetuned"

    from maejax.train import plan, train  # JAX is imported only once the command makes sense

    quieten_libraries()
    workdir = options.workdir or Path("runs") / name
    train(plan(config, workdir, start_from=options.start_from, adapt=options.adapt, notes=notes))


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
