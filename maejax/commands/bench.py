"""Measure what this machine gives.

examples:
  maejax bench data ~/photos
  maejax bench data ~/photos --config=pretrain_vit_l16_imagenet --chip=h100 --json
  maejax bench step --config=pretrain_vit_ti4_cifar10 --config.batch_size=128

`maejax bench WHAT --help` shows the options of each.
"""

import importlib
from collections.abc import Sequence

from maejax.errors import UsageError, look_up

BENCHES = {  # each a module `bench_NAME` beside this
    "data": "the host's pipeline: images a second a core, by stage",
    "step": "the training step alone and in its loop, beside a large matrix product; the start",
}


def run(arguments: Sequence[str]) -> None:
    """maejax bench."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name, about in BENCHES.items():
            print(f"  {name:6} {about}")
        if not arguments:
            raise UsageError(f"say what to measure: maejax bench {' or '.join(BENCHES)}")
        return
    look_up(BENCHES, arguments[0], "maejax bench")
    importlib.import_module(f"maejax.commands.bench_{arguments[0]}").run(arguments[1:])
