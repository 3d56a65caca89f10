"""What a run minimises. An objective is a Flax module from a batch to `(loss, metrics)`; the step knows no more of it.

A class in `OBJECTIVES` is constructed with keyword arguments: `encoder` (a ViT), `decoder` (a Decoder) and `norm_pix`.
So is one from outside this package, named in the config as "package.module:Class".
"""

from typing import Any

from maejax.objectives.mae import MaskedAutoencoder

OBJECTIVES: dict[str, Any] = {"mae": MaskedAutoencoder}
