"""big_vision's names for a ViT, as its .npz files have them ("params/..."): the encoder alone.

Two things differ from this project's encoder. Its position table has no row for the class token (ours has zeros there).
And its MLP uses the tanh approximation of GELU, so features differ in the third or fourth digit; `--verify` says by how
much.
"""

from maejax.convert.names import DENSE, FLAX_CONVOLUTION, SAME, Layout, Rule, blocks

_ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK: list[tuple[str, str, Layout, int | None]] = [
    ("LayerNorm_0/scale", "norm1/scale", SAME, None),
    ("LayerNorm_0/bias", "norm1/bias", SAME, None),
    *((f"{_ATTENTION}/{name}/kernel", "attn/qkv/kernel", SAME, i) for i, name in enumerate(("query", "key", "value"))),
    *((f"{_ATTENTION}/{name}/bias", "attn/qkv/bias", SAME, i) for i, name in enumerate(("query", "key", "value"))),
    (f"{_ATTENTION}/out/kernel", "attn/proj/kernel", SAME, None),
    (f"{_ATTENTION}/out/bias", "attn/proj/bias", SAME, None),
    ("LayerNorm_1/scale", "norm2/scale", SAME, None),
    ("LayerNorm_1/bias", "norm2/bias", SAME, None),
    ("MlpBlock_0/Dense_0/kernel", "mlp/fc1/kernel", DENSE, None),
    ("MlpBlock_0/Dense_0/bias", "mlp/fc1/bias", SAME, None),
    ("MlpBlock_0/Dense_1/kernel", "mlp/fc2/kernel", DENSE, None),
    ("MlpBlock_0/Dense_1/bias", "mlp/fc2/bias", SAME, None),
]
TABLE = [
    Rule("params/cls", "encoder/cls_token"),
    Rule("params/pos_embedding", "encoder/pos_embed"),
    Rule("params/embedding/kernel", "encoder/embed/kernel", FLAX_CONVOLUTION),
    Rule("params/embedding/bias", "encoder/embed/bias"),
    *blocks("params/Transformer/encoderblock_{i}/", "encoder", BLOCK),
    Rule("params/Transformer/encoder_norm/scale", "encoder/norm/scale"),
    Rule("params/Transformer/encoder_norm/bias", "encoder/norm/bias"),
]
