"""Write all of a run or a sweep into one HTML file: curves, pictures, evaluations or the ranking, config, faults.

examples:
  maejax report runs/digits
  maejax report runs/ratios --out=ratios.html

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
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the folder)")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "report.html"
    text = page_of(options.run, datetime.now())

    from maejax.reports import page

    try:
        page.write(out, text)
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written to: {error.strerror}; name another file") from error
    print(f"report    {out} ({out.stat().st_size / 1e6:.1f} MB)")


def page_of(folder: Path, now: datetime) -> str:
    """The page of a run or a sweep; raises UsageError if it is neither."""
    if (folder / "config.json").is_file():
        from maejax import record
        from maejax.reports.run import run_page

        return run_page(record.read(folder), now)
    from maejax import sweep

    if not sweep.is_sweep(folder):
        raise UsageError(f"{folder} is neither a run nor a sweep: it has no config.json and no {sweep.FILE}")
    from maejax.reports.sweep import sweep_page

    return sweep_page(sweep.read(folder), now)
