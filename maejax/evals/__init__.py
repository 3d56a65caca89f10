"""What a network is worth, measured on whole splits.

An evaluation in `EVALS` looks at what the objective's `method` makes of the unmasked images: "features", averaged over
an image's patches, or a classifier's "logits". Its function gets these and the labels of a training and a test split,
each (n d) and (n), and the number of classes; it returns numbers by their metrics' names, the most important first.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from maejax.evals.accuracy import accuracy
from maejax.evals.knn import knn
from maejax.evals.probe import linear_probe
from maejax.evals.rankme import rankme

Split = tuple[np.ndarray, np.ndarray]


class Eval(NamedTuple):
    """One evaluation; `trains`: whether it needs the training split, too."""

    method: str
    trains: bool
    function: Callable[[Split, Split, int], dict[str, float]]


EVALS: dict[str, Eval] = {
    "knn": Eval("features", True, lambda train, test, k: {"knn_top1": knn(train, test, num_classes=k)}),
    "linear": Eval("features", True, lambda train, test, k: {"linear_top1": linear_probe(train, test, num_classes=k)}),
    "rankme": Eval("features", False, lambda train, test, k: {"rankme": rankme(test[0])}),
    "accuracy": Eval("logits", False, lambda train, test, k: accuracy(*test)),
}
