"""What verbs share in reading their arguments."""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.distributed import Place, find_place, join
from maejax.errors import UsageError
from maejax.fake import pretend_devices, run_processes
from maejax.lookout import looking_out
from maejax.supervise import supervise

if TYPE_CHECKING:
    from maejax.prepare import Plan


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

    def error(self, message: str) -> NoReturn:
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
    if equals and not os.path.exists(argument) and key.lstrip("-").replace(".", "").replace("_", "").isalnum():
        key = key.lstrip("-").removeprefix("config.")
        if any(key == known for known, _ in configs.flatten(configs.default())):
            raise UsageError(f"{argument!r} would be ignored; write --config.{key}={value}")


def parse_training(parser: Parser, others: Sequence[str], assignments: dict[str, str]) -> argparse.Namespace:
    """The options of a verb that trains: its own, and those that all of them have. Adds to the config's assignments."""
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    parser.add_argument("--keys", action="store_true", help="list the config with its values and stop")
    parser.add_argument("--config", metavar="FILE", help="a recipe; --config.KEY=VALUE overrides one of its keys")
    several = parser.add_argument_group("several processes", "found without help under Slurm, Open MPI, torchrun, ...")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="P", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument("--supervise", action="store_true", help="start it again when it dies, stalls or is pre-empted")
    several.add_argument("--fake-processes", type=int, metavar="P", help="try it here: start P processes on the CPU")
    several.add_argument("--fake-devices", type=int, metavar="D", help="with D devices each")
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([options.data] if options.data else [])]:
        refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see {parser.prog} --help")
    if options.wandb:
        assignments.setdefault("wandb", "true")
    for name in ("fake_processes", "fake_devices"):
        if (number := getattr(options, name)) is not None and not 1 <= number <= 64:
            raise UsageError(f"--{name.replace('_', '-')}={number} must lie between 1 and 64")
    if options.fake_processes or options.fake_devices:
        pretend_devices(options.fake_devices or 1)
    options.place = find_place(
        coordinator=options.coordinator, num_processes=options.num_processes, process_id=options.process_id
    )
    if options.fake_processes and options.place.num_processes > 1:
        raise UsageError(f"--fake-processes starts processes, and this one has a place already ({options.place.rule})")
    return options


def attended(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Signals and time are watched from here on, unless this process only starts others."""
    return contextlib.nullcontext() if options.fake_processes else looking_out()


def under_supervision(verb: str, arguments: Sequence[str], workdir: Path) -> int:
    """The same command without --supervise in a child process, again and again if need be; its last exit code."""
    kept = [argument for argument in arguments if argument != "--supervise"]
    return supervise([sys.executable, "-m", "maejax", verb, *kept], workdir)


def train_in_place(verb: str, arguments: Sequence[str], options: argparse.Namespace, plan: "Plan") -> int:
    """Trains in this process's place among others, or with --fake-processes in that many new ones; the exit code."""
    from maejax.mesh import check_topology
    from maejax.train import train
    from maejax.workdir import check_free

    check_free(plan.workdir)
    c, processes = plan.config, options.fake_processes or options.place.num_processes
    devices = devices_each(options.place)
    check_topology(c.mesh, c.batch_size, c.grad_accum_steps, processes=processes, devices=devices)
    if options.fake_processes:
        # The children get the same command; that it makes sense has just been found out, once.
        kept, rest = [verb], iter(arguments)
        for argument in rest:
            if argument == "--fake-processes":
                next(rest)
            elif not argument.startswith("--fake-processes="):
                kept.append(argument)
        return run_processes(kept, options.fake_processes)
    with looking_out() as lookout:
        lookout.join(options.place.process_id, join(options.place))
        train(dataclasses.replace(plan, notes=(*plan.notes, str(options.place))))
    return 0


def devices_each(place: Place) -> int | None:
    """How many devices each process will have, as far as it is known without a look at them."""
    import jax

    if place.local_devices is not None:
        return len(place.local_devices)
    known = jax.config.values["jax_platforms"] == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", "")
    return max(int(jax.config.values["jax_num_cpu_devices"]), 1) if known else None


def print_keys(config: ConfigDict) -> None:
    """Every key with its value, as flags."""
    for key, value in configs.flatten(config):
        print(f"--config.{key}={value}")


@functools.cache
def _let_writers_end_quietly() -> None:
    """When one write of a checkpoint fails, which is told, Orbax lets go of the others; their ends reach nobody."""
    before = sys.unraisablehook

    def hook(told: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
            before(told)

    sys.unraisablehook = hook


def prepare_libraries() -> None:
    """Orbax and Grain tell of every step of their work through absl's log; JAX forgets what it has compiled."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # what they raise is told once, by us
    _let_writers_end_quietly()
    if not jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "maejax" / "compiled"))
