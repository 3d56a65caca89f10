"""The networks: a ViT encoder that can be shown only some patches, and the decoder of masked autoencoding.

`SIZES` are the encoders by name: width, depth, heads (Dosovitskiy et al. 2021, Table 1; Ti and S: Touvron et al. 2021).
"""

from maejax.models.decoder import Decoder
from maejax.models.vit import ViT

SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}

__all__ = ["SIZES", "Decoder", "ViT"]
