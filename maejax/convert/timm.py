"""timm: the names of its Vision Transformers' tensors, and the folder that `create_model("local-dir:OUT")` takes.

The official MAE weights go by the same names (timm 0.3.2, on which that code stands). Only the encoder goes into a timm
folder: timm takes any file with a `mask_token` for DINOv2 and drops it.
"""

from typing import Any

from maejax.convert.names import CONVOLUTION, FLAT, MATRIX, MATRIX_OF_HEADS, SAME, Layout, Rule, blocks

BLOCK: list[tuple[str, str, Layout, int | None]] = [
    ("norm1.weight", "norm1/scale", SAME, None),
    ("norm1.bias", "norm1/bias", SAME, None),
    ("attn.qkv.weight", "attn/qkv/kernel", MATRIX, None),
    ("attn.qkv.bias", "attn/qkv/bias", FLAT, None),
    ("attn.proj.weight", "attn/proj/kernel", MATRIX_OF_HEADS, None),
    ("attn.proj.bias", "attn/proj/bias", SAME, None),
    ("norm2.weight", "norm2/scale", SAME, None),
    ("norm2.bias", "norm2/bias", SAME, None),
    ("mlp.fc1.weight", "mlp/fc1/kernel", MATRIX, None),
    ("mlp.fc1.bias", "mlp/fc1/bias", SAME, None),
    ("mlp.fc2.weight", "mlp/fc2/kernel", MATRIX, None),
    ("mlp.fc2.bias", "mlp/fc2/bias", SAME, None),
]
# The TPU originals have no key bias: some files hold the other two alone, and the keys' is zero.
WITHOUT_KEY_BIAS: list[tuple[str, str, Layout, int | None]] = [
    *(row for row in BLOCK if row[0] != "attn.qkv.bias"),
    ("attn.q_bias", "attn/qkv/bias", FLAT, 0),
    ("attn.v_bias", "attn/qkv/bias", FLAT, 2),
]
OUTSIDE = [
    Rule("cls_token", "encoder/cls_token"),
    Rule("pos_embed", "encoder/pos_embed"),
    Rule("patch_embed.proj.weight", "encoder/embed/kernel", CONVOLUTION),
    Rule("patch_embed.proj.bias", "encoder/embed/bias"),
    Rule("norm.weight", "encoder/norm/scale"),
    Rule("norm.bias", "encoder/norm/bias"),
    Rule("fc_norm.weight", "fc_norm/scale"),  # fine-tuned, with the mean of the patches
    Rule("fc_norm.bias", "fc_norm/bias"),
    Rule("head.weight", "head/kernel", MATRIX),
    Rule("head.bias", "head/bias"),
]
TABLE = OUTSIDE + blocks("blocks.{i}.", "encoder", BLOCK)
TABLE_WITHOUT_KEY_BIAS = OUTSIDE + blocks("blocks.{i}.", "encoder", WITHOUT_KEY_BIAS)

ARCHITECTURES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}


def config(facts: dict[str, Any], license: str | None) -> dict[str, Any]:
    """config.json. The arguments are all written out, so the architecture's name decides nothing.

    Pooling is "token" (or, without a class token, the mean after the norm): with timm's own "avg" the norm comes after
    the mean, which is another function with other parameters.
    """
    h, w = facts["image"]
    side = f"patch{facts['patch'][0]}_{h}"
    name = f"vit_{ARCHITECTURES.get(facts['size'], 'base')}_{side}"
    known = {"vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224",
             "vit_huge_patch14_224"}  # fmt: skip
    pooling = facts["pool"] or ("token" if facts["cls_token"] else "avg")
    arguments = {
        "img_size": [h, w], "patch_size": list(facts["patch"]), "embed_dim": facts["width"], "depth": facts["depth"],
        "num_heads": facts["heads"], "mlp_ratio": facts["mlp_ratio"], "class_token": facts["cls_token"],
        "in_chans": facts["channels"], "fc_norm": facts["fc_norm"], "global_pool": pooling,
    }  # fmt: skip
    pretrained = {
        "num_classes": facts["classes"], "input_size": [facts["channels"], h, w], "fixed_input_size": True,
        "mean": facts["mean"], "std": facts["std"], "interpolation": "bicubic", "crop_pct": 0.875,
        "first_conv": "patch_embed.proj", "classifier": "head", "license": license or "unknown",
    }  # fmt: skip
    return {
        "architecture": name if name in known else "vit_base_patch16_224",
        "num_classes": facts["classes"],
        "num_features": facts["width"],
        "global_pool": pooling,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
