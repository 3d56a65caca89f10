"""The networks: a ViT encoder that can be shown only some patches, and the decoders of masked autoencoding.

`SIZES` are the encoders by name: width, depth, heads (Dosovitskiy et al. 2021, Table 1; Ti and S: Touvron et al. 2021;
g: Zhai et al. 2022, Table 2; 2B and 6.5B: Singh et al. 2023, masked autoencoders of those sizes). An MLP has four times
the width, but for those of `MLP_RATIOS`.
"""

from maejax.models.cross import CrossDecoder
from maejax.models.decoder import Decoder
from maejax.models.vit import ViT

SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
    "g": (1408, 40, 16),
    "2B": (2560, 24, 32),
    "6.5B": (4096, 32, 32),
}
MLP_RATIOS = {"g": 6144 / 1408}

__all__ = ["MLP_RATIOS", "SIZES", "CrossDecoder", "Decoder", "ViT"]
