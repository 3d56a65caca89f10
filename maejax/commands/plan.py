"""Say what a run needs on hardware that you do not have: memory, traffic, time.

examples:
  maejax plan --config=configs/pretrain_vit_l16_imagenet.py --on=v5e-32
  maejax plan --config=configs/pretrain_vit_h14_imagenet.py --on=v5e-64,v5p-64,gpu:h100x8 --json
  maejax plan --config=configs/pretrain_vit_l16_imagenet.py --on=v5e:4x4 --config.model.remat=dots

For TPUs the real training step is compiled with libtpu ('maejax[tpu]'), on any Linux machine, in minutes; times are
predicted by the compiler. For GPUs all is arithmetic. It needs no data: --num-examples says how many there are.
Names are Google's: v5e-32 and v6e-32 have 32 chips, v4-128 and v5p-128 have 64 (they count cores).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from maejax import config as configs
from maejax.commands.arguments import Parser, refuse_bare_assignment, split_config_flags
from maejax.errors import UsageError
from maejax.overrides import override

if TYPE_CHECKING:
    from maejax.forecast import Forecast

IMAGENET = 1_281_167  # images of ImageNet-1k's training split
# What may make a run fit that does not, gentlest first; the first that does is told.
REMEDIES: tuple[dict[str, str], ...] = (
    {"model.remat": "dots"},
    {"grad_accum_steps": "2"},
    {"sharding": "fsdp", "mesh.data": "1", "mesh.fsdp": "-1"},
    {"model.remat": "full"},
    {"model.remat": "full", "grad_accum_steps": "4"},
    {"model.remat": "full", "grad_accum_steps": "4", "sharding": "fsdp", "mesh.data": "1", "mesh.fsdp": "-1"},
)


def run(arguments: Sequence[str]) -> None:
    """maejax plan."""
    file, assignments, others = split_config_flags(arguments)
    parser = Parser("plan", __doc__)
    parser.add_argument("--config", metavar="FILE", help="a recipe; --config.KEY=VALUE overrides one of its keys")
    parser.add_argument("--on", required=True, metavar="NAME,...", help="v5e-32, v5p:4x4x8, gpu:h100x8, ...")
    parser.add_argument(
        "--num-examples", type=int, default=IMAGENET, metavar="N", help="images (default: ImageNet-1k's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options, unknown = parser.parse_known_args(others)
    for argument in unknown:
        refuse_bare_assignment(argument)
        raise UsageError(f"unknown argument {argument!r}; see maejax plan --help")
    if file is None:
        raise UsageError("say what to plan: --config=RECIPE; see maejax plan --help")
    if options.num_examples < 1:
        raise UsageError(f"--num-examples={options.num_examples} must be at least 1")

    from maejax import build
    from maejax.check import check
    from maejax.forecast import forecast
    from maejax.targets import parse_targets

    config = override(configs.load(file), assignments)
    check(config)
    build.check_names(config)
    targets = parse_targets(options.on)
    found: list[Forecast] = []
    remedies: list[dict[str, str] | None] = []
    for target in targets:
        found.append(forecast(config, target, options.num_examples))
        remedies.append(None if found[-1].fits else _remedy(config, found[-1], options.num_examples))
    if options.json:
        plans = [plan.as_dict() | {"remedy": remedy} for plan, remedy in zip(found, remedies, strict=True)]
        print(json.dumps({"config": configs.to_dict(config), "plans": plans}))
        return
    for plan, remedy in zip(found, remedies, strict=True):
        for line in lines(plan, config, remedy):
            print(line)
    if len(found) > 1:
        for line in table(found):
            print(line)


def _remedy(config: ConfigDict, plan: "Forecast", num_examples: int) -> dict[str, str] | None:
    """The first of REMEDIES that makes the run fit, by trying; None: none does."""
    from maejax.forecast import forecast

    for remedy in REMEDIES:
        print(f"{plan.target.name} is too small; trying {flags(remedy)}", file=sys.stderr, flush=True)
        try:
            if forecast(override(config, remedy), plan.target, num_examples).fits:
                return remedy
        except UsageError as error:  # a batch or a width that cannot be split so
            print(f"  {error}", file=sys.stderr, flush=True)
    return None


def flags(assignments: dict[str, str]) -> str:
    """As they are typed."""
    return " ".join(f"--config.{key}={value}" for key, value in assignments.items())


def lines(plan: "Forecast", config: ConfigDict, remedy: dict[str, str] | None) -> Iterator[str]:
    """The report on one target."""
    n, gb = plan.target.num_devices, 1e-9
    unit = "chip" if plan.target.shape else "GPU"
    shape = f" ({plan.target.shape})" if plan.target.shape else ""
    axes = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield f"{plan.target.name}: {n} {unit}s of {plan.target.chip}{shape}, {plan.how}"
    yield f"mesh      {axes}, {config.sharding}; batch {plan.batch_size} = {plan.batch_size / n:g} a {unit}"
    parts = ", ".join(f"{name} {size * gb:.2f}" for name, size in plan.memory.items() if name != "total" and size)
    total = f"{plan.memory['total'] * gb:.2f} of {plan.chip.memory * gb:.1f} GB a {unit}"
    yield f"memory    {total}: {'fits' if plan.fits else 'does not fit'} ({parts})"
    if plan.largest_batch:
        yield f"          batches up to {plan.largest_batch} fit, if all temporaries grow with the batch"
    if not plan.fits:
        advice = f"fits with {flags(remedy)}" if remedy else "nothing that was tried makes it fit; take more of them"
        yield f"          {advice}"
    if plan.traffic:
        kinds = ", ".join(f"{kind} {size * gb:.3g}" for kind, size in plan.traffic.items() if size)
        sent = sum(plan.traffic.values())
        ratio = f", {sent / plan.least_traffic:.2f} x the least" if plan.least_traffic else ""
        yield f"traffic   {sent * gb:.3g} GB a {unit} and step{ratio} ({kinds or 'nothing'})"
    elif plan.least_traffic is not None:
        yield f"traffic   {plan.least_traffic * gb:.3g} GB a {unit} and step, at least"
    yield f"work      {plan.flops:.4g} FLOP a {unit} and step, {plan.flops / plan.least_flops:.3f} x the analytic"
    source = (
        f"{plan.cycles:,} cycles"
        + (f", {plan.kernel_cycles:,} of kernels counted by hand" if plan.kernel_cycles else "")
        if plan.cycles
        else "an assumed utilisation"
        if not plan.target.shape
        else "at the peak: the compiled text cannot be read"
    )
    yield (
        f"step      {plan.how}: {plan.step_time:.3f} s = {plan.compute:.3f} computing ({source}) + "
        f"{plan.communication:.3f} sending, if nothing overlaps; {plan.batch_size / plan.step_time:,.0f} img/s, "
        f"MFU {100 * plan.mfu:.0f} %"
    )
    length = f"{plan.total_steps:,} steps, {plan.hours:.1f} hours, {plan.hours * n:,.0f} {unit}-hours"
    sides = ", ".join(map(str, config.data.sides))
    growing = f", {plan.mean_work:.2f} x that of all steps at {config.image_size[0]} px, sides {sides}" if sides else ""
    yield f"run       {plan.how}: {length}{growing}"
    if plan.compile_seconds:
        yield f"compiled  in {plan.compile_seconds:.0f} s, {plan.compile_cpu_seconds:.0f} s of CPU"


def table(plans: Sequence["Forecast"]) -> Iterator[str]:
    """One line a target."""
    yield f"{'on':16} {'devices':>7} {'GB each':>8} {'of':>6} {'fits':>5} {'img/s':>9} {'MFU':>5} {'hours':>7}  how"
    for plan in plans:
        yield (
            f"{plan.target.name:16} {plan.target.num_devices:7} {plan.memory['total'] / 1e9:8.2f} "
            f"{plan.chip.memory / 1e9:6.1f} {'yes' if plan.fits else 'no':>5} {plan.batch_size / plan.step_time:9,.0f} "
            f"{100 * plan.mfu:4.0f}% {plan.hours:7.1f}  {plan.how}"
        )
