"""What a run minimises. An objective is a Flax module from a batch to `(loss, metrics)`; the step knows no more of it.

One from outside this package, named in the config as "package.module:Class", is constructed as "mae" is: with `encoder`
(a ViT), `decoder` (a Decoder or CrossDecoder) and `norm_pix`. Parameters whose names begin with one of a class's
`fresh` need not be in the weights that a run starts from.
"""

from typing import Any

from maejax.objectives.classify import Classifier
from maejax.objectives.mae import MaskedAutoencoder
from maejax.objectives.pca import PrincipalComponents

OBJECTIVES: dict[str, Any] = {"mae": MaskedAutoencoder, "pca": PrincipalComponents, "classify": Classifier}
