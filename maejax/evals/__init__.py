"""What a representation is worth, measured on frozen features.

An evaluation in `EVALS` is a function of the features and labels of a training and of a test split, each (n d) and (n),
and of the number of classes; it returns one number, by the metric's name.
"""

from collections.abc import Callable

import numpy as np

from maejax.evals.knn import knn
from maejax.evals.probe import linear_probe
from maejax.evals.rankme import rankme

Split = tuple[np.ndarray, np.ndarray]

EVALS: dict[str, tuple[str, Callable[[Split, Split, int], float]]] = {
    "knn": ("knn_top1", lambda train, test, k: knn(train, test, num_classes=k)),
    "linear": ("linear_top1", lambda train, test, k: linear_probe(train, test, num_classes=k)),
    "rankme": ("rankme", lambda train, test, k: rankme(test[0])),
}
