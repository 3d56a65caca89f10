"""Follow a run in the terminal, over ssh too: its curves, and what it reconstructs, drawn with characters.

examples:
  maejax watch runs/digits
  maejax watch runs/digits --once

It only reads the run's folder, so it may start and end at any time; Ctrl-C ends it. --once prints one frame.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from maejax.commands.arguments import Parser
from maejax.errors import UsageError


def run(arguments: Sequence[str]) -> None:
    """maejax watch."""
    parser = Parser("watch", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between frames (default: 2)")
    options = parser.parse_args(arguments)
    if not options.every >= 0.1:
        raise UsageError(f"--every={options.every:g} is too often; give at least 0.1 seconds")
    if not (options.once or sys.stdout.isatty()):
        raise UsageError("watch needs a terminal to draw on, and this is none; --once prints one frame")

    from maejax import record, watch

    if (options.run / "sweep.json").is_file():
        raise UsageError(
            f"{options.run} is a sweep; watch one of the runs in it, or see maejax sweep {options.run} --show"
        )
    record.read(options.run)  # a mistake in the folder's name comes before the screen is cleared
    if options.once:
        watch.once(options.run)
    else:
        watch.follow(options.run, options.every)
