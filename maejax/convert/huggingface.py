"""Hugging Face's names: ViTMAE with its decoder, or a plain ViT.

Three spellings are read: that of the hub's files and transformers 4, which is also what is written (transformers 5
still loads it); that of transformers 5's modules; and what transformers 5.24 saves, whose decoder blocks are called
"decoder_encoder.layer". `canonical` turns all into the first.
"""

import re
from collections.abc import Iterable
from typing import Any

from maejax.convert.names import CONVOLUTION, FLAT, MATRIX, MATRIX_OF_HEADS, SAME, Layout, Rule, blocks

_QKV = [("query", 0), ("key", 1), ("value", 2)]
BLOCK: list[tuple[str, str, Layout, int | None]] = [
    ("layernorm_before.weight", "norm1/scale", SAME, None),
    ("layernorm_before.bias", "norm1/bias", SAME, None),
    *((f"attention.attention.{name}.weight", "attn/qkv/kernel", MATRIX, part) for name, part in _QKV),
    *((f"attention.attention.{name}.bias", "attn/qkv/bias", FLAT, part) for name, part in _QKV),
    ("attention.output.dense.weight", "attn/proj/kernel", MATRIX_OF_HEADS, None),
    ("attention.output.dense.bias", "attn/proj/bias", SAME, None),
    ("layernorm_after.weight", "norm2/scale", SAME, None),
    ("layernorm_after.bias", "norm2/bias", SAME, None),
    ("intermediate.dense.weight", "mlp/fc1/kernel", MATRIX, None),
    ("intermediate.dense.bias", "mlp/fc1/bias", SAME, None),
    ("output.dense.weight", "mlp/fc2/kernel", MATRIX, None),
    ("output.dense.bias", "mlp/fc2/bias", SAME, None),
]
TABLE = [
    Rule("vit.embeddings.cls_token", "encoder/cls_token"),
    Rule("vit.embeddings.position_embeddings", "encoder/pos_embed"),
    Rule("vit.embeddings.patch_embeddings.projection.weight", "encoder/embed/kernel", CONVOLUTION),
    Rule("vit.embeddings.patch_embeddings.projection.bias", "encoder/embed/bias"),
    *blocks("vit.encoder.layer.{i}.", "encoder", BLOCK),
    Rule("vit.layernorm.weight", "encoder/norm/scale"),
    Rule("vit.layernorm.bias", "encoder/norm/bias"),
    Rule("decoder.mask_token", "decoder/mask_token"),
    Rule("decoder.decoder_pos_embed", "decoder/pos_embed"),
    Rule("decoder.decoder_embed.weight", "decoder/embed/kernel", MATRIX),
    Rule("decoder.decoder_embed.bias", "decoder/embed/bias"),
    *blocks("decoder.decoder_layers.{i}.", "decoder", BLOCK),
    Rule("decoder.decoder_norm.weight", "decoder/norm/scale"),
    Rule("decoder.decoder_norm.bias", "decoder/norm/bias"),
    Rule("decoder.decoder_pred.weight", "decoder/pred/kernel", MATRIX),
    Rule("decoder.decoder_pred.bias", "decoder/pred/bias"),
]
ENCODER_TABLE = [  # a plain ViTModel has no prefix
    Rule(rule.theirs.removeprefix("vit."), rule.ours, rule.layout, rule.part)
    for rule in TABLE
    if rule.ours.startswith("encoder/")
]
POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # ViTModel's own head, which is no part of the encoder

_SPELLINGS = [
    (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def canonical(names: Iterable[str]) -> dict[str, str]:
    """{the name in `TABLE`'s spelling: the name as it is}."""
    found = {}
    for name in names:
        spelled = name
        for pattern, replacement in _SPELLINGS:
            spelled = re.sub(pattern, replacement, spelled)
        found[name if spelled in found else spelled] = name  # two spellings of one tensor: the second is left over
    return found


def config(facts: dict[str, Any], *, encoder_only: bool) -> dict[str, Any]:
    """config.json. The eps is written out: ViTMAE's default is 1e-12, the weights were trained with 1e-6."""
    h, w = facts["image"]
    p, q = facts["patch"]
    shared = {
        "hidden_size": facts["width"], "num_hidden_layers": facts["depth"], "num_attention_heads": facts["heads"],
        "intermediate_size": facts["hidden"], "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "image_size": h if h == w else [h, w], "patch_size": p if p == q else [p, q], "num_channels": facts["channels"],
        "qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
        "torch_dtype": "float32",
    }  # fmt: skip
    if encoder_only:
        return {"architectures": ["ViTModel"], "model_type": "vit", **shared}
    return {
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", **shared,
        "decoder_hidden_size": facts["decoder_width"], "decoder_num_hidden_layers": facts["decoder_depth"],
        "decoder_num_attention_heads": facts["decoder_heads"], "decoder_intermediate_size": 4 * facts["decoder_width"],
        "mask_ratio": facts["mask_ratio"], "norm_pix_loss": facts["norm_pix"],
    }  # fmt: skip


def preprocessor(facts: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json."""
    h, w = facts["image"]
    return {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": h, "width": w},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": facts["mean"], "image_std": facts["std"],
    }  # fmt: skip
