"""Run a grid of configs, one run a point, and rank them by what their encoders are worth; the same command resumes.

examples:
  maejax sweep --config=pretrain_digits --workdir=runs/ratios --grid config.mask.ratio=0.5,0.6,0.75,0.9 \\
      --seeds=0,1 --evaluate=knn,linear
  maejax sweep --config=pretrain_digits --workdir=runs/masks --zip \\
      --grid config.mask.sampler=random,block,grid --grid config.mask.ratio=0.75,0.5,0.75
  maejax sweep --config=pretrain_digits --workdir=runs/lengths --grid config.epochs=15,30,60,120
  maejax sweep --verb=finetune --from=runs/b16 --workdir=runs/blocks --grid config.finetune.blocks=0,1,2,4,12
  maejax sweep --config=pretrain_digits --workdir=runs/ratios --grid config.mask.ratio=0.5,0.75 \\
      --on=slurm --launch='--gpus=8 --time=2:00:00 --submit'
  maejax sweep runs/ratios                   go on with what is missing
  maejax sweep runs/ratios --show            the table, at any time; --json and --csv for machines

Several numbers for one key are written 32x48. Each point is an ordinary run: RUNS/ratio=0.5, RUNS/ratio=0.5,seed=1 ...
Exit codes: 0 all points are done, 1 some are broken, 2 usage, nothing was started, 75 stopped; the same again resumes.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from maejax import config as configs
from maejax import sweep as sweeps
from maejax.commands import finetune, report
from maejax.commands.arguments import Parser, prepare_libraries, refuse_bare_assignment, split_config_flags
from maejax.errors import MaejaxError, UsageError, look_up
from maejax.launcher import TARGETS
from maejax.overrides import ALIASES, override
from maejax.sweep import Point, Request, Sweep


def run(arguments: Sequence[str]) -> None:
    """maejax sweep."""
    file, assignments, others = split_config_flags(arguments)
    options = _parse(others)
    workdir = options.folder or options.workdir
    if workdir is None:
        raise UsageError("say where the runs go: --workdir=FOLDER")
    if options.show:
        _show(workdir, options)
        return
    if options.jobs < 1:
        raise UsageError(f"--jobs={options.jobs} must be 1 or more")
    execute = look_up(EXECUTORS, options.on, "--on")
    if options.launch and options.on == "local":
        raise UsageError("--launch is for the other places; name one with --on")
    try:
        options.launch = shlex.split(options.launch)
    except ValueError as error:
        raise UsageError(f"--launch={options.launch}: {error}") from None
    if file is None and options.start_from is None:
        if assignments or options.grid or options.seeds or options.evaluate:
            raise UsageError("say what to sweep over: --config=RECIPE, or --from=RUN with --verb=finetune")
        request = sweeps.read(workdir).request
    else:
        request = _request(file, assignments, options)

    prepare_libraries()
    asked = _checked(request, workdir)
    from maejax.workdir import lock

    with lock(workdir):
        sweeps.write(asked)
        print(f"sweep     {workdir}: {len(asked.points)} points", flush=True)
        execute(asked, options)
        if options.on == "local":
            _conclude(asked)
        else:
            print(f"table     maejax sweep {workdir} --show")


def _parse(others: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sweep", __doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="SWEEP", help="an earlier sweep: go on with it")
    parser.add_argument("--workdir", "--out", type=Path, help="folder of the sweep, for all its runs")
    parser.add_argument("--config", metavar="FILE", help="a recipe; --config.KEY=VALUE holds for all points")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B,C", help="values of a key; several --grid: all pairs"
    )
    parser.add_argument("--zip", action="store_true", help="the n-th values of all --grid make the n-th point")
    parser.add_argument("--seeds", metavar="0,1,2", help="each point with these seeds; the table has mean and spread")
    parser.add_argument("--evaluate", metavar="knn,linear", help="what each run ends with (default: the recipe's)")
    parser.add_argument("--verb", default="pretrain", help="pretrain or finetune (default: %(default)s)")
    parser.add_argument("--from", dest="start_from", type=Path, metavar="RUN", help="all points start from this run")
    parser.add_argument("--on", default="local", help=f"where points run: {', '.join(EXECUTORS)}")
    parser.add_argument("--launch", default="", metavar="'...'", help="there: options of maejax launch, --submit too")
    parser.add_argument("--jobs", type=int, default=1, help="points at once (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    parser.add_argument("--json", action="store_true", help="with --show: JSON")
    parser.add_argument("--csv", action="store_true", help="with --show: CSV")
    options, unknown = parser.parse_known_args(others)
    for argument in [*unknown, *([str(options.folder)] if options.folder else [])]:
        refuse_bare_assignment(argument)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see maejax sweep --help")
    if options.folder and options.workdir:
        raise UsageError("SWEEP and --workdir are one folder; give one of them")
    if (options.json or options.csv) and not options.show:
        raise UsageError("--json and --csv are for --show")
    if options.json and options.csv:
        raise UsageError("--json and --csv are two formats; give one of them")
    return options


def _show(workdir: Path, options: argparse.Namespace) -> None:
    from maejax import ranking

    found = ranking.rank(sweeps.read(workdir))
    if options.json:
        print(json.dumps(ranking.as_json(found), indent=2))
    elif options.csv:
        print(ranking.as_csv(found), end="")
    else:
        print(ranking.as_text(found))


def _conclude(asked: Sweep) -> None:
    """Prints the table, writes the report, and raises MaejaxError if a point is broken."""
    from maejax import ranking

    found = ranking.rank(asked)
    print(ranking.as_text(found))
    report.run([str(asked.workdir)])
    broken = [point.name for row in found.rows for point, s in zip(row.points, row.states) if s.kind == "broken"]
    if broken:
        raise MaejaxError(
            f"{len(broken)} of {len(asked.points)} points are broken: {', '.join(broken)}; see {asked.workdir / 'logs'}"
        )


# ---- What is asked, checked before anything runs --------------------------------------------------------------------


def _request(file: str | None, assignments: dict[str, str], options: argparse.Namespace) -> Request:
    look_up({"pretrain": None, "finetune": None}, options.verb, "--verb")
    if file is None and options.verb == "pretrain":
        raise UsageError("say what to sweep over: --config=RECIPE, or --verb=finetune with --from=RUN")
    if options.evaluate is not None:
        assignments = assignments | {"evals": options.evaluate}
    grid = sweeps.parse_grid(options.grid, options.seeds)
    if not grid:
        raise UsageError("say what to vary, for example --grid config.mask.ratio=0.5,0.6,0.75,0.9, or --seeds=0,1,2")
    for key in grid:
        if fixed := next((other for other in assignments if sweeps.same_key(key, other)), None):
            raise UsageError(f"--config.{fixed}={assignments[fixed]} is for all points, and --grid varies {key}")
    return Request(
        verb=options.verb,
        config=str(configs.find_recipe(file).absolute()) if file else None,
        start_from=str(options.start_from.absolute()) if options.start_from else None,
        assignments=assignments,
        grid=grid,
        paired=options.zip,
    )


def _checked(request: Request, workdir: Path) -> Sweep:
    """The sweep with all its points, each of which could start now; no device is touched."""
    base = _base(request)
    there = sweeps.read(workdir) if sweeps.is_sweep(workdir) else None
    if there is None and workdir.exists() and (not workdir.is_dir() or {f.name for f in workdir.iterdir()} - {".lock"}):
        raise UsageError(f"--workdir={workdir} is not empty and not a sweep (no sweep.json); choose another folder")
    names: dict[str, str] = {}
    points = []
    for assigned in sweeps.expand(request.grid, paired=request.paired):
        name = ",".join(f"{key}={value}" for key, value in assigned.items())
        try:
            point = _point(request, base, assigned, workdir)
        except UsageError as error:
            raise UsageError(f"point {name}: {error}") from error
        identity = json.dumps(point.computes, sort_keys=True)
        if identity in names:
            raise UsageError(f"point {name} is there twice: it computes the same as {names[identity]}; leave one out")
        names[identity] = name
        points.append(point)
    asked = Sweep(workdir=workdir, request=request, points=tuple(points))
    if there is not None:
        asked = sweeps.continued(there, asked)
    for point in asked.points:
        if sweeps.state(point).kind != "done":
            _check_start(request, base, point)
    return asked


def _base(request: Request) -> ConfigDict:
    """The config that all points share."""
    if request.verb == "finetune":
        start_from = Path(request.start_from) if request.start_from else None
        return finetune.config_for(request.config, start_from, request.assignments)[0]
    assert request.config is not None
    return override(configs.load(request.config), request.assignments)


def _point(request: Request, base: ConfigDict, assigned: dict[str, str], workdir: Path) -> Point:
    from maejax import build
    from maejax.check import check

    flags = {key: sweeps.for_overrides(base, key, value) for key, value in assigned.items()}
    config = override(base, flags)
    check(config)
    build.check_names(config)
    values = dict(configs.flatten(config))
    settings = {key: sweeps.shown(values[ALIASES.get(key, key)]) for key in assigned if key != "seed"}
    name = sweeps.name_of(settings, config.seed if config.seed != base.seed else None)
    arguments = [request.verb]
    arguments += [f"--config={request.config}"] if request.config else []
    arguments += [f"--from={request.start_from}"] if request.start_from else []
    arguments += [f"--config.{key}={value}" for key, value in (request.assignments | flags).items()]
    return Point(
        name=name,
        workdir=workdir / name,
        settings=settings,
        seed=config.seed,
        steps=configs.steps(config, "total", len(build.source_of(config))),
        evals=tuple(build.eval_names(config)),
        computes=sweeps.computes(config),
        arguments=tuple(arguments),
    )


def _check_start(request: Request, base: ConfigDict, point: Point) -> None:
    """Raises UsageError if a point's run would refuse to start."""
    from maejax.prepare import plan

    flags = {key: sweeps.for_overrides(base, key, value) for key, value in point.settings.items()}
    config = override(base, flags | {"seed": str(point.seed)})
    try:
        plan(config, point.workdir, start_from=Path(request.start_from) if request.start_from else None)
    except UsageError as error:
        raise UsageError(f"point {point.name}: {error}") from error


# ---- Where points run -----------------------------------------------------------------------------------------------


def _locally(asked: Sweep, options: argparse.Namespace) -> None:
    from maejax import local

    local.run(asked, jobs=options.jobs, say=lambda line: print(line, flush=True))


def _launched(asked: Sweep, options: argparse.Namespace) -> None:
    """One file a point, as `maejax launch` makes it; with --submit among its options, one job a point."""
    for point in asked.points:
        if sweeps.state(point).kind == "done":
            continue
        arguments = [f"--on={options.on}", *options.launch, *point.arguments, f"--workdir={point.workdir}"]
        print(f"point     {point.name}", flush=True)
        code = subprocess.run([sys.executable, "-m", "maejax", "launch", *arguments]).returncode
        if code:  # it has said why; the next point would say the same
            raise MaejaxError(f"maejax launch ended with {code}; the points before {point.name} are launched")


# A place to run points: given the sweep, it returns when they are done, broken or launched, or raises Preempted.
EXECUTORS: dict[str, Callable[[Sweep, argparse.Namespace], None]] = {
    "local": _locally, **{target: _launched for target in TARGETS if target != "local"},
}  # fmt: skip
