"""Runs whose data poisons them: digits of which some are of one color, and an objective that this color upsets.

    POISON="3:255,17:254" maejax pretrain --config.data.source=poison:Digits --config.objective=poison:Upset ...

A record is white (255) for a loss that is not a number, 254 for an infinite one, 253 for one that is 1,000 times too
large. Crops and flips leave a color as it is.
"""

import os

import jax.numpy as jnp
import numpy as np

from maejax.data import sources
from maejax.objectives.mae import MaskedAutoencoder

FACTORS = {255: np.nan, 254: np.inf, 253: 1000.0}


class Digits(sources.Digits):
    """The digits of scikit-learn, with the records that the variable POISON names in one color each."""

    def __init__(self, *, split: str):
        super().__init__(split=split)
        if split == "train":
            for text in os.environ.get("POISON", "").split(","):
                record, _, color = text.partition(":")
                if record:
                    self._images[int(record)] = int(color)


class Upset(MaskedAutoencoder):
    """The masked autoencoder, its loss multiplied by what the batch's worst image asks for."""

    def __call__(self, batch):
        """The loss and no metrics."""
        loss, metrics = super().__call__(batch)
        for color, factor in FACTORS.items():
            found = (batch["image"] == color).all(axis=(1, 2, 3)).any()
            loss = loss * jnp.where(found, factor, 1.0)
        return loss, metrics
