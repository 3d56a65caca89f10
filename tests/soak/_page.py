"""docs/reliability.md: the fault matrix with what was measured last."""

from collections.abc import Sequence
from typing import Any

from soak import Campaign

HEAD = """# What a run survives

Every row is a fault that has ruined somebody's pretraining run, what maejax promises, and how often it kept its word
when the fault was made. This page is generated: `python -m soak` runs the campaigns (`make soak`), keeps its
results in [`reliability.json`](reliability.json) and writes the page. Trials that were not run yet are shown as such.

| row | fault | promise | campaign | held | numbers (min, median, max) | on every commit |
|---|---|---|---|---|---|---|
"""

# Rows, or parts of them, that are not held, and why.
NOT_HELD: dict[int, str] = {
    28: "there is no replay audit. Computing a step twice finds what goes wrong in the steps that are computed twice, "
    "one in a hundred or fewer, needs a second program that keeps the old state (twice its memory), and on GPUs, "
    "where sums may be taken in another order, it would raise false alarms. What stays wrong is found by row 27.",
}


def page(campaigns: Sequence[Campaign], results: dict[str, Any], costs: list[dict[str, str]]) -> str:
    """The page as Markdown; `costs` as benchmarks/results/guards_DATE.json has them."""
    lines = [_line(c, results.get(c.name)) for c in sorted(campaigns, key=lambda c: c.row)]
    text = HEAD + "\n".join(lines) + "\n"
    if NOT_HELD:
        text += "\n## Not held\n\n" + "\n".join(f"* Row {row}: {why}" for row, why in sorted(NOT_HELD.items())) + "\n"
    text += "\n## What it costs\n\n| what | allowed | measured | command |\n|---|---|---|---|\n"
    text += "".join(f"| {c['what']} | {c['allowed']} | {c['measured']} | `{c['command']}` |\n" for c in costs)
    machines = sorted({(r["machine"], r["date"]) for r in results.values()})
    return text + "\n" + "\n".join(f"Measured on {machine}, {date}." for machine, date in machines) + "\n"


def _line(c: Campaign, result: dict[str, Any] | None) -> str:
    held, numbers = f"not run yet, {c.trials} planned", ""
    if result:
        held = f"**{result['held']} of {result['trials']}**"
        if result["trials"] < c.trials:
            held += f" ({c.trials} planned)"
        numbers = "; ".join(
            f"{name} {_short(n['min'])}, {_short(n['median'])}, {_short(n['max'])}"
            for name, n in result["numbers"].items()
        )
    return f"| {c.row} | {c.fault} | {c.promise} | `{c.name}` | {held} | {numbers} | {c.fast} |"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
