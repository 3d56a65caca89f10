"""The command line: `maejax VERB ...`. Each verb parses its arguments and calls one function."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.errors import MaejaxError, UsageError
from maejax.overrides import override

PRETRAIN = """\
examples:
  maejax pretrain ~/photos --workdir=runs/photos
  maejax pretrain --config=configs/pretrain_vit_b16_imagenet.py --workdir=runs/b16 --config.mask.ratio=0.6

The same command again goes on where the run stopped. Every key of the config can be set with --config.KEY=VALUE;
`maejax pretrain --keys` lists them. Exit codes: 0 done, 2 usage, 65 too many bad images, 66 no valid checkpoint,
70 diverged, 74 storage failed, 75 interrupted and saved (run the same command again).
"""
EVALUATE = """\
examples:
  maejax evaluate runs/digits
  maejax evaluate runs/cifar10 --with=knn,linear,rankme --data=tfds:cifar10 --config.data.dir=DIR

Writes evals/<name>_<step>.json into the run, too.
"""
RECONSTRUCT = """\
examples:
  maejax reconstruct runs/photos
  maejax reconstruct runs/photos cat.jpg dog.png --out=grid.png --mask-ratio=0.9
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. A user's mistake is one line on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.splitlines()[0])
        for verb, (_, about) in VERBS.items():
            print(f"  {verb:12} {about}")
        print("`maejax VERB --help` shows a verb's options and examples.")
        return 0 if arguments else 2
    try:
        if arguments[0] == "--version":
            from maejax import __version__

            print(f"maejax {__version__}")
            return 0
        if arguments[0] not in VERBS:
            raise UsageError(f"unknown command {arguments[0]!r}; commands: {', '.join(VERBS)}")
        VERBS[arguments[0]][0](arguments[1:])
        return 0
    except MaejaxError as error:
        print(f"maejax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before training started: nothing to save
        print("maejax: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Errors as one line, like all others."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser(verb: str, epilog: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=f"maejax {verb}",
        description=VERBS[verb][1],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def split_config_flags(arguments: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Takes `--config=FILE` and `--config.KEY=VALUE` out: (file, {key: value}, the other arguments)."""
    file, assignments, others = None, {}, []
    rest = iter(arguments)
    for argument in rest:
        if not (argument == "--config" or argument.startswith(("--config=", "--config."))):
            others.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UsageError(f"{name} needs a value: {name}=VALUE")
            value = following
        if name == "--config":
            file = value
        else:
            assignments[name.removeprefix("--config.")] = value
    return file, assignments, others


def pretrain(arguments: Sequence[str]) -> None:
    """maejax pretrain."""
    file, assignments, others = split_config_flags(arguments)
    parser = _parser("pretrain", PRETRAIN)
    parser.add_argument("data", nargs="?", help="images: a folder, digits, tfds:NAME or arrayrecord:GLOB")
    parser.add_argument("--workdir", "--out", type=Path, help="folder of the run (default: runs/ and the data's name)")
    parser.add_argument("--from", dest="start_from", type=Path, metavar="RUN", help="start from another run's weights")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument("--keys", action="store_true", help="list the config with its values and stop")
    parser.add_argument("--config", metavar="FILE", help="a recipe; --config.KEY=VALUE overrides one of its keys")
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([options.data] if options.data else [])]:
        _refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see maejax pretrain --help")
    if options.wandb:
        assignments.setdefault("wandb", "true")
    if options.keys:
        config = override(configs.load(file) if file else configs.default(), assignments)
        for key, value in configs.flatten(config):
            print(f"--config.{key}={value}")
        return
    if options.data is None and file is None:
        raise UsageError("say what to train on: maejax pretrain FOLDER, or --config=RECIPE; see maejax pretrain --help")
    if options.data is not None and file is not None:
        assignments.setdefault("data.source", options.data)
    name = Path(file).stem if file else Path(options.data.rpartition(":")[2]).expanduser().absolute().name
    workdir = options.workdir or Path("runs") / name

    from maejax.train import plan, train  # JAX is imported only once the command makes sense

    _quieten_libraries()
    notes: tuple[str, ...] = ()
    if file is not None:
        config = override(configs.load(file), assignments)
    else:
        config, notes = _config_for_folder(options.data, workdir, assignments)
    train(plan(config, workdir, start_from=options.start_from, notes=notes))


def _refuse_bare_assignment(argument: str) -> None:
    key, equals, value = argument.partition("=")
    if equals and not Path(argument).exists() and key.lstrip("-").replace(".", "").replace("_", "").isalnum():
        key = key.lstrip("-").removeprefix("config.")
        if any(key == known for known, _ in configs.flatten(configs.default())):
            raise UsageError(f"{argument!r} would be ignored; write --config.{key}={value}")


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


def reconstruct(arguments: Sequence[str]) -> None:
    """maejax reconstruct."""
    parser = _parser("reconstruct", RECONSTRUCT)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("images", nargs="*", type=Path, help="image files (default: some of the run's data)")
    parser.add_argument(
        "--out", type=Path, default=Path("reconstruction.png"), help="the picture (default: %(default)s)"
    )
    parser.add_argument("--mask-ratio", help="share of hidden patches (default: the run's)")
    parser.add_argument("--sampler", help="random, block or grid (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    options = parser.parse_args(arguments)

    from maejax import build, runs
    from maejax.data.decode import BadImage, decode

    _quieten_libraries()
    c, objective, weights = runs.load_objective(options.run)
    asked = {"mask.ratio": options.mask_ratio, "mask.sampler": options.sampler}
    c = override(c, {key: value for key, value in asked.items() if value is not None})
    configs.check(c)
    build.check_names(c)
    if options.images:
        for path in options.images:  # say which file is wrong before anything is computed
            try:
                decode(path.read_bytes(), channels=c.data.channels, max_pixels=c.data.max_pixels)
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


def _quieten_libraries() -> None:
    """Orbax and Grain tell of every step of their work through absl's log."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def evaluate(arguments: Sequence[str]) -> None:
    """maejax evaluate."""
    file, assignments, others = split_config_flags(arguments)
    if file is not None:
        raise UsageError("evaluate takes the config of the run; override its keys with --config.KEY=VALUE")
    parser = _parser("evaluate", EVALUATE)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--with", dest="evals", default="knn,linear", help="evaluations (default: %(default)s)")
    parser.add_argument("--data", help="labelled images (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(others)

    from maejax import build, runs
    from maejax.evaluate import Evaluator, shown

    _quieten_libraries()
    if options.data is not None:
        assignments.setdefault("data.source", options.data)
    config = override(runs.config_of_run(options.run), assignments | {"evals": options.evals})
    configs.check(config)
    names = build.eval_names(config)
    if not names:
        raise UsageError("--with names no evaluation; for example --with=knn,linear")
    evaluator = Evaluator(config, names)
    step, values = runs.evaluate(options.run, evaluator)
    evaluator.record(options.run, step, values)
    if options.json:
        print(json.dumps({"run": str(options.run), "step": step} | values))
        return
    splits = f"trained on {config.data.split}, scored on {config.data.eval_split}"
    print(f"{options.run} at step {step}, {config.data.source}: {splits}")
    for name, value in values.items():
        print(f"  {name:8} {shown(name, value):>8}")


def convert(arguments: Sequence[str]) -> None:
    """maejax convert."""
    from maejax.convert import command

    parser = _parser("convert", command.EXAMPLES)
    command.add_arguments(parser)
    _quieten_libraries()
    command.convert(parser.parse_args(arguments))


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "pretrain": (pretrain, "train a masked autoencoder on images; the same command again resumes"),
    "evaluate": (evaluate, "measure what a run's features are worth: kNN, linear probe, RankMe"),
    "reconstruct": (reconstruct, "draw original | masked | reconstruction of a run's images or yours"),
    "convert": (convert, "weights in and out: official MAE, timm, Hugging Face, big_vision, safetensors, ONNX"),
}
