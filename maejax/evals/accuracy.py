"""Accuracy and loss of a classifier on a whole split."""

import numpy as np


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] and the mean cross-entropy of logits (n k) and labels (n).

    The label's rank counts the classes that are more likely, or as likely and before it.
    """
    own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    before = np.arange(logits.shape[1])[None] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    largest = logits.max(axis=1, keepdims=True).astype(np.float64)
    loss = (np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0] - own[:, 0]).mean()
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), "loss": float(loss)}
