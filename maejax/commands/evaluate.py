"""Measure what a run's network is worth: kNN, linear probe, RankMe, accuracy.

examples:
  maejax evaluate runs/digits
  maejax evaluate runs/cifar10 --with=knn,linear,rankme --data=tfds:cifar10 --config.data.dir=DIR

Writes evals/<name>_<step>.json into the run, too; of other images than the run's, evals/on-<data>/<name>_<step>.json.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from maejax.commands.arguments import Parser, prepare_libraries, split_config_flags
from maejax.errors import UsageError
from maejax.overrides import override


def run(arguments: Sequence[str]) -> None:
    """maejax evaluate."""
    file, assignments, others = split_config_flags(arguments)
    if file is not None:
        raise UsageError("evaluate takes the config of the run; override its keys with --config.KEY=VALUE")
    parser = Parser("evaluate", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--with", dest="evals", help="knn, linear, rankme, accuracy (default: what suits the run)")
    parser.add_argument("--data", help="labelled images (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(others)

    from maejax import build, runs
    from maejax.check import check
    from maejax.evaluate import Evaluator, by_metric
    from maejax.metrics import shown

    prepare_libraries()
    if options.data is not None:
        assignments.setdefault("data.source", options.data)
    before = runs.config_of_run(options.run)
    suited = "accuracy" if build.classifies(before) else "knn,linear"
    config = override(before, assignments | {"evals": suited if options.evals is None else options.evals})
    check(config)
    build.check_names(config)
    names = build.eval_names(config)
    if not names:
        raise UsageError("--with names no evaluation; for example --with=knn,linear")
    evaluator = Evaluator(config, names)
    step, results = runs.evaluate(options.run, evaluator)
    values = by_metric(results)
    if options.json:
        print(json.dumps({"run": str(options.run), "step": step} | values))
    else:
        print(f"{options.run} at step {step}, {config.data.source}, scored on {config.data.eval_split}")
        for metric, value in values.items():
            print(f"  {metric:12} {shown(metric, value):>9}")
    other = re.sub(r"[^\w.-]+", "-", f"{config.data.source}-{config.data.eval_split}").strip("-")
    try:  # what the run says of itself is of its own images
        evaluator.record(options.run, step, results, "evals" if config.data == before.data else f"evals/on-{other}")
    except OSError as error:
        raise UsageError(f"the results cannot be kept in {options.run}: {error.strerror}") from error
