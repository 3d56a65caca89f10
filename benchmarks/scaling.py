"""What `maejax plan` says of the large runs, as tables for docs/scaling.md.

    python benchmarks/scaling.py --cache=runs/scaling --write=docs/scaling.md

Every plan is a file in the cache, so an interrupted command goes on where it stopped; a plan takes two to ten minutes
of two cores. Text between the marks in docs/scaling.md is replaced, all else is left.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

L, H = "configs/pretrain_vit_l16_imagenet.py", "configs/pretrain_vit_h14_imagenet.py"
FSDP = ("--config.sharding=fsdp", "--config.mesh.data=1", "--config.mesh.fsdp=-1")
PLANS: dict[str, tuple[str, ...]] = {  # name in the table: arguments of `maejax plan`
    "L/16, v5e-32": (f"--config={L}", "--on=v5e-32"),
    "H/14, v5e-64": (f"--config={H}", "--on=v5e-64"),
    "L/16, v5e-32, unrolled": (f"--config={L}", "--on=v5e-32", "--config.model.scan=false"),
    "H/14, v5e-64, unrolled": (f"--config={H}", "--on=v5e-64", "--config.model.scan=false"),
    "6.5B/14, v5p-256": (f"--config={H}", "--on=v5p-256", "--config.model.size=6.5B", *FSDP),
    "2B/14, v5p-128": (f"--config={H}", "--on=v5p-128", "--config.model.size=2B", *FSDP),
    "L/16, v5e-16, 64 a chip": (f"--config={L}", "--on=v5e-16", "--config.batch_size=1024"),
    "L/16, v5e-256, 64 a chip": (f"--config={L}", "--on=v5e-256", "--config.batch_size=16384"),
}
START, END = "<!-- benchmarks/scaling.py writes from here -->", "<!-- to here -->"


def plan(name: str, cache: Path) -> dict:
    """The plan of that name, from the cache if it is there."""
    path = cache / f"{name.replace('/', '').replace(', ', '_').replace(' ', '-')}.json"
    if not path.exists():
        print(f"planning {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "maejax", "plan", *PLANS[name], "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cache.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(done.stdout)
        os.replace(path.with_suffix(".part"), path)
    return json.loads(path.read_text())["plans"][0]


def tables(plans: dict[str, dict]) -> str:
    """Markdown."""
    text = ["| run | chips | memory a chip, GB | of | fits | batches up to | optimizer stored | compiled in s (CPU) |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, p in plans.items():
        parts = ", ".join(f"{key} {size / 1e9:.2f}" for key, size in p["memory"].items() if key != "total" and size)
        text.append(
            f"| {name} | {p['target']['num_devices']} | {p['memory']['total'] / 1e9:.2f} ({parts}) | "
            f"{p['chip']['memory'] / 1e9:.1f} | {'yes' if p['fits'] else 'no'} | {p['largest_batch']} | "
            f"{p['optimizer_share']:.3f} x | {p['compile_seconds']:.0f} ({p['compile_cpu_seconds']:.0f}) |"
        )
    text += ["", "| run | sent a chip and step, GB | over the least | FLOP over analytic | cycles | step, s: computing "
             "+ sending | MFU | hours | chip-hours |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, p in plans.items():
        sent = {kind: size for kind, size in (p["traffic"] or {}).items() if size}
        kinds = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sent.items()) or "could not be read"
        if not p["cycles"]:  # only a bound is known, and a table of predictions is no place for it
            text.append(f"| {name} | {kinds} | - | {p['flops'] / p['least_flops']:.3f} | - | - | - | - | - |")
            continue
        total, ratio = sum(sent.values()) / 1e9, sum(sent.values()) / p["least_traffic"]
        step = f"{p['compute']:.3f} + {p['communication']:.3f}"
        text.append(
            f"| {name} | {total:.3f} ({kinds}) | {ratio:.3f} | {p['flops'] / p['least_flops']:.3f} | "
            f"{(p['cycles'] or 0) / 1e6:.0f} M | {step} | {100 * p['mfu']:.0f} % | "
            f"{p['hours']:.1f} | {p['device_hours']:.0f} |"
        )
    return "\n".join(text)


def main() -> None:
    """Makes what is missing and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--only", help="part of the names of those to plan; the table has all that the cache holds")
    options = parser.parse_args()
    for name in PLANS:
        if options.only is None or options.only in name:
            plan(name, options.cache)
    stored = {path.stem for path in options.cache.glob("*.json")}
    names = [name for name in PLANS if name.replace("/", "").replace(", ", "_").replace(" ", "-") in stored]
    before, _, rest = options.write.read_text().partition(START)
    after = rest.partition(END)[2]
    table = tables({name: plan(name, options.cache) for name in names})
    options.write.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
