"""Write what a run was and how it went into one HTML file: curves, pictures, evaluations, config, faults.

examples:
  maejax report runs/digits
  maejax report runs/digits --out=digits.html

The file needs no server and no network: open it, mail it, print it. It can be made while the run goes on.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from maejax.commands.arguments import Parser
from maejax.errors import UsageError


def run(arguments: Sequence[str]) -> None:
    """maejax report."""
    parser = Parser("report", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the folder)")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "report.html"

    from maejax import record
    from maejax.reports import page
    from maejax.reports.run import run_page

    text = run_page(record.read(options.run), datetime.now())
    try:
        page.write(out, text)
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written to: {error.strerror}; name another file") from error
    print(f"report    {out} ({out.stat().st_size / 1e6:.1f} MB)")
