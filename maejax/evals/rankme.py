"""RankMe: how many dimensions features really use (Garrido et al. 2023, arXiv 2210.02885). Needs no labels."""

import numpy as np


def rankme(features: np.ndarray) -> float:
    """The exponential of the entropy of the normalised singular values of features (n d): from 1 to min(n, d)."""
    # The eigenvalues of the d x d matrix are the squares of the singular values, and d is small.
    gram = features.astype(np.float64).T @ features.astype(np.float64)
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))
