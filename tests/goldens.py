"""Weights under other projects' names, from a seed, and what those projects' own code computes with them.

The weights are drawn here with numpy alone, so nothing large is stored; `tests/data/convert.npz` holds the answers of
transformers and timm, made by `python tests/interop/make_goldens.py`. So parity is tested where torch is not installed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maejax.convert.forward import sine_cosine

FILE = Path(__file__).parent / "data" / "convert.npz"
SIZES = {  # width, depth, heads, patch, image, decoder (width, depth, heads)
    "tiny": (48, 3, 4, 8, 32, (32, 2, 4)),
    "B": (768, 12, 12, 16, 224, (512, 8, 16)),
    "H2": (1280, 2, 16, 14, 224, (512, 8, 16)),  # ViT-H/14, but two blocks
    "H": (1280, 32, 16, 14, 224, (512, 8, 16)),
}


def table(size: str, width: int) -> np.ndarray:
    """The fixed position table of a size, (1 1+n width)."""
    _, _, _, patch, image, _ = SIZES[size]
    return sine_cosine({"image": (image, image), "patch": (patch, patch), "cls_token": True}, width)


def _shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Official names and torch's shapes, without the tables."""
    d, depth, _, p, _, (e, e_depth, _) = SIZES[size]
    yield from (("cls_token", (1, 1, d)), ("patch_embed.proj.weight", (d, 3, p, p)), ("patch_embed.proj.bias", (d,)))
    for prefix, width, blocks in (("", d, depth), ("decoder_", e, e_depth)):
        for i in range(blocks):
            at = f"{prefix}blocks.{i}"
            for name, out, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
                yield f"{at}.{name}.weight", (out * width, inputs * width)
                yield f"{at}.{name}.bias", (out * width,)
            for norm in ("norm1", "norm2"):
                yield from ((f"{at}.{norm}.weight", (width,)), (f"{at}.{norm}.bias", (width,)))
        yield from ((f"{prefix}norm.weight", (width,)), (f"{prefix}norm.bias", (width,)))
    yield from (("mask_token", (1, 1, e)), ("decoder_embed.weight", (e, d)), ("decoder_embed.bias", (e,)))
    yield from (("decoder_pred.weight", (p * p * 3, e)), ("decoder_pred.bias", (p * p * 3,)))


def official(size: str, *, decoder: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict under the official code's names; matrices keep the scale of what goes through them."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in _shapes(size):
        if not decoder and name.startswith(("decoder_", "mask_token")):
            break  # the encoder's come first
        draw = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) in (2, 4):
            draw *= np.float32(np.prod(shape[1:]) ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            draw = 1 + np.float32(0.1) * draw
        else:
            draw *= np.float32(0.1)
        tensors[name] = draw
    tensors["pos_embed"] = table(size, SIZES[size][0])
    if decoder:
        tensors["decoder_pos_embed"] = table(size, SIZES[size][5][0])
    return tensors


HUB = [
    ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"), ("cls_token", "vit.embeddings.cls_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"), ("pos_embed", "vit.embeddings.position_embeddings"),
    ("mask_token", "decoder.mask_token"), ("decoder_embed", "decoder.decoder_embed"),
    ("decoder_pred", "decoder.decoder_pred"), ("decoder_norm", "decoder.decoder_norm"),
    ("decoder_blocks.", "decoder.decoder_layers."), ("blocks.", "vit.encoder.layer."), ("norm.", "vit.layernorm."),
]  # fmt: skip
INSIDE = [
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
]  # fmt: skip


def hub(size: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The same weights under the names of Hugging Face's hub, where queries, keys and values are apart."""
    tensors = {}
    for name, tensor in official(size, seed=seed).items():
        start, replacement = next(pair for pair in HUB if name.startswith(pair[0]))
        renamed = replacement + name.removeprefix(start)
        for old, new in INSIDE:
            renamed = renamed.replace(old, new)
        if ".attn.qkv." in renamed:
            for part, rows in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                tensors[renamed.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            tensors[renamed] = tensor
    return tensors


def hub_config(size: str, norm_pix: bool) -> dict[str, object]:
    """The config.json beside them."""
    d, depth, heads, patch, image, (e, e_depth, e_heads) = SIZES[size]
    return {
        "model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], "hidden_size": d,
        "num_hidden_layers": depth,
        "num_attention_heads": heads, "intermediate_size": 4 * d, "patch_size": patch, "image_size": image,
        "decoder_hidden_size": e, "decoder_num_hidden_layers": e_depth, "decoder_num_attention_heads": e_heads,
        "decoder_intermediate_size": 4 * e, "layer_norm_eps": 1e-6, "norm_pix_loss": norm_pix, "mask_ratio": 0.75,
        "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True,
    }  # fmt: skip


def images(size: int, count: int = 2, seed: int = 0) -> np.ndarray:
    """uint8 (b h w 3), with large and small structures."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 200, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (coarse + rng.uniform(0, 55, (count, size, size, 3))).astype(np.uint8)


def normalized(batch: np.ndarray) -> np.ndarray:
    """As torch's side wants it: float32 (b c h w)."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((batch / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def noise(size: str, count: int = 2) -> np.ndarray:
    """What decides the mask: the patches of least noise are kept; float32 (b n), no two alike."""
    n = (SIZES[size][4] // SIZES[size][3]) ** 2
    return np.random.default_rng(1).permuted(np.tile(np.arange(n), (count, 1)), axis=1).astype(np.float32)


def sample(array: np.ndarray, count: int = 700) -> np.ndarray:
    """Some of an array's values, evenly spread."""
    flat = np.asarray(array).reshape(-1)
    return flat[:: max(flat.size // count | 1, 1)]


def ask_maejax(weights, batch: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Loss, predictions of the masked patches (b m p*q*c) with their places, and features of the whole images."""
    import jax

    from maejax import build

    objective = build.make_objective(weights.config)
    order = np.argsort(noise, axis=1, kind="stable").astype(np.int32)
    v = int(noise.shape[1] * (1 - weights.config.mask.ratio))
    pixels = normalized(batch).transpose(0, 2, 3, 1)
    encoder = jax.jit(lambda p: objective.encoder.apply({"params": p}, pixels))(weights.tree["encoder"])
    found = {"features": np.asarray(encoder), "masked": order[:, v:]}
    if "decoder" in weights.parts:
        rows = {"image": batch, "visible": order[:, :v], "masked": order[:, v:]}

        def both(params):
            predicted = objective.apply({"params": params}, pixels, rows["visible"], rows["masked"], method="predict")
            return objective.apply({"params": params}, rows)[0], predicted

        loss, predicted = jax.jit(both)(weights.tree)
        found |= {"loss": np.asarray(loss), "predictions": np.asarray(predicted)}
    return found
