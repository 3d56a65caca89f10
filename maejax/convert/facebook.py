"""The official MAE code's names (facebookresearch/mae): timm's for the encoder, and its own for the decoder.

Its released files are encoder alone (`mae_pretrain_vit_base.pth`), with the decoder (`..._full.pth`, trained on
normalised patches; `mae_visualize_vit_*.pth`, on plain ones) and fine-tuned (`mae_finetuned_vit_*.pth`).
"""

import re

from maejax.convert import timm
from maejax.convert.names import MATRIX, Rule, blocks

DECODER = [
    Rule("mask_token", "decoder/mask_token"),
    Rule("decoder_pos_embed", "decoder/pos_embed"),
    Rule("decoder_embed.weight", "decoder/embed/kernel", MATRIX),
    Rule("decoder_embed.bias", "decoder/embed/bias"),
    Rule("decoder_norm.weight", "decoder/norm/scale"),
    Rule("decoder_norm.bias", "decoder/norm/bias"),
    Rule("decoder_pred.weight", "decoder/pred/kernel", MATRIX),
    Rule("decoder_pred.bias", "decoder/pred/bias"),
]
TABLE = timm.TABLE + DECODER + blocks("decoder_blocks.{i}.", "decoder", timm.BLOCK)
TABLE_WITHOUT_KEY_BIAS = (
    timm.TABLE_WITHOUT_KEY_BIAS + DECODER + blocks("decoder_blocks.{i}.", "decoder", timm.WITHOUT_KEY_BIAS)
)
DECODER_HEADS = 16  # of all released sizes
LICENSE = "cc-by-nc-4.0"
RELEASED = re.compile(r"mae_(pretrain|visualize|finetuned)_vit_(base|large|huge)")


def released_targets(file: str) -> bool | None:
    """Whether a released file with a decoder was trained on normalised patches; None if the name does not say."""
    if not RELEASED.match(file):
        return None
    return not file.startswith("mae_visualize")
