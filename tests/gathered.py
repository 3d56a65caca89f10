"""Run by test_processes as a process among others: global batches as the loop gets them, gathered and written.

python gathered.py OUT FIRST LAST --config.KEY=VALUE ...
"""

import sys

import numpy as np

from maejax import config as configs
from maejax.commands.arguments import split_config_flags
from maejax.distributed import find_place, join
from maejax.overrides import override


def main() -> None:
    """Steps FIRST+1 to LAST of a run on the digits."""
    out, first, last, *flags = sys.argv[1:]
    config = override(configs.load("pretrain_digits"), split_config_flags(flags)[1])
    join(find_place())

    from pathlib import Path

    import jax

    from maejax.mesh import make_mesh
    from maejax.prepare import plan
    from maejax.processes import fetch
    from maejax.train import feed

    mesh = make_mesh(config.mesh)
    p = plan(config, Path(out).with_suffix(".run"))
    steps = [{key: fetch(x) for key, x in fed.batch.items()} for fed in feed(p, mesh, int(first), int(last))]
    if jax.process_index() == 0:
        np.savez(out, **{f"{key}-{step}": x for step, batch in enumerate(steps) for key, x in batch.items()})


if __name__ == "__main__":
    main()
