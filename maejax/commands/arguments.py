"""What verbs share in reading their arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A verb's parser, described by its module's docstring. Errors are one line, like all others."""

    def __init__(self, verb: str, docstring: str | None):
        about, _, examples = (docstring or "").partition("\n")
        super().__init__(
            prog=f"maejax {verb}",
            description=about,
            epilog=examples.strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


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


def refuse_bare_assignment(argument: str) -> None:
    """Raises UsageError for `key=value`, which would be taken for something else than the override that was meant."""
    key, equals, value = argument.partition("=")
    if equals and not Path(argument).exists() and key.lstrip("-").replace(".", "").replace("_", "").isalnum():
        key = key.lstrip("-").removeprefix("config.")
        if any(key == known for known, _ in configs.flatten(configs.default())):
            raise UsageError(f"{argument!r} would be ignored; write --config.{key}={value}")


def parse_training(parser: Parser, others: Sequence[str], assignments: dict[str, str]) -> argparse.Namespace:
    """The options of a verb that trains: its own, and those that all of them have. Adds to the config's assignments."""
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument("--keys", action="store_true", help="list the config with its values and stop")
    parser.add_argument("--config", metavar="FILE", help="a recipe; --config.KEY=VALUE overrides one of its keys")
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([options.data] if options.data else [])]:
        refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see {parser.prog} --help")
    if options.wandb:
        assignments.setdefault("wandb", "true")
    return options


def print_keys(config: ConfigDict) -> None:
    """Every key with its value, as flags."""
    for key, value in configs.flatten(config):
        print(f"--config.{key}={value}")


def quieten_libraries() -> None:
    """Orbax and Grain tell of every step of their work through absl's log."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)
