"""The network once more, in plain numpy, written from the paper: what `--verify` checks written files with.

It shares no code and no table of names with the rest of this package, so that an error there shows here. It reads the
files' own names, one block at a time, and is slow.

Axes: b images, s tokens, n patches, v visible, d width, k heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf

Get = Callable[[str], np.ndarray]  # a tensor of a file, by its name there
Block = dict[str, np.ndarray]  # matrices (inputs, outputs) and vectors, by the short names below


@dataclasses.dataclass(frozen=True)
class Stack:
    """An encoder or a decoder: `place` is its position table (1 s d), `block(i)` reads a block."""

    embed: np.ndarray
    embed_bias: np.ndarray
    place: np.ndarray
    token: np.ndarray | None  # class token, or mask token
    block: Callable[[int], Block]
    depth: int
    heads: int
    norm: tuple[np.ndarray, np.ndarray] | None  # None: a fine-tuned one, which normalises after pooling
    output: tuple[np.ndarray, np.ndarray] | None = None
    approximate: bool = False  # the tanh form of GELU


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Over the last axis, eps 1e-6."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gelu(x: np.ndarray, approximate: bool) -> np.ndarray:
    """x times the normal distribution function."""
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / np.float32(math.sqrt(2))))


def transform(x: np.ndarray, stack: Stack) -> np.ndarray:
    """All blocks and the norm after them, (b s d) -> (b s d)."""
    b, s, d = x.shape
    size = d // stack.heads

    def heads(y: np.ndarray) -> np.ndarray:
        return y.reshape(b, s, stack.heads, size).transpose(0, 2, 1, 3)

    for i in range(stack.depth):
        w = stack.block(i)
        y = layer_norm(x, w["n1"], w["n1b"])
        q, k, v = (heads(y @ w[name] + w[f"{name}b"]) for name in "qkv")
        scores = q @ k.transpose(0, 1, 3, 2) / np.float32(math.sqrt(size))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(0, 2, 1, 3).reshape(b, s, d) @ w["o"] + w["ob"]
        y = gelu(layer_norm(x, w["n2"], w["n2b"]) @ w["up"] + w["upb"], stack.approximate)
        x = x + y @ w["down"] + w["downb"]
    return x if stack.norm is None else layer_norm(x, *stack.norm)


def cut(images: np.ndarray, p: int, q: int) -> np.ndarray:
    """(b h w c) -> (b n p*q*c), row by row."""
    b, h, w, c = images.shape
    return images.reshape(b, h // p, p, w // q, q, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * q * c)


def encode(encoder: Stack, patches: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """Patches (b n p*q*c), of which `visible` (b v) are seen, to tokens (b [1+]v d)."""
    has_cls = int(encoder.token is not None)
    x = patches @ encoder.embed + encoder.embed_bias + encoder.place[:, has_cls:]
    if visible is not None:
        x = np.stack([row[order] for row, order in zip(x, visible, strict=True)])
    if encoder.token is not None:
        first = np.repeat(encoder.token + encoder.place[:, :1], len(x), axis=0)
        x = np.concatenate([first, x], axis=1)
    return transform(x, encoder)


def loss(encoder: Stack, decoder: Stack, patches: np.ndarray, order: np.ndarray, v: int, norm_pix: bool) -> float:
    """The mean squared error over the patches that are not the first `v` of `order` (b n)."""
    y = encode(encoder, patches, order[:, :v]) @ decoder.embed + decoder.embed_bias
    assert decoder.token is not None and decoder.output is not None
    has_cls = int(encoder.token is not None)
    whole = np.repeat(decoder.token, patches.shape[1], axis=1).repeat(len(patches), axis=0)
    for row, places, seen in zip(whole, order, y[:, has_cls:], strict=True):
        row[places[:v]] = seen
    x = transform(np.concatenate([y[:, :has_cls], whole], axis=1) + decoder.place, decoder)
    predicted = x[:, has_cls:] @ decoder.output[0] + decoder.output[1]
    target = patches
    if norm_pix:
        deviation = np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
        target = (target - target.mean(-1, keepdims=True)) / deviation
    errors = ((predicted - target) ** 2).mean(-1)
    return float(np.mean([row[places[v:]].mean() for row, places in zip(errors, order, strict=True)]))


# ---- The files' names -----------------------------------------------------------------------------------------------


def _torch_patch(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def official(get: Get, f: dict[str, Any], has: Callable[[str], bool], part: str = "") -> Stack:
    """The official code's and timm's names; `part` is "decoder_" for the decoder. `f` are facts of the network."""

    def block(i: int) -> Block:
        at = f"{part}blocks.{i}."
        qkv = get(f"{at}attn.qkv.weight")
        if has(f"{at}attn.q_bias"):
            q_bias, v_bias = get(f"{at}attn.q_bias"), get(f"{at}attn.v_bias")
            biases = [q_bias, np.zeros_like(q_bias), v_bias]
        else:
            biases = np.split(get(f"{at}attn.qkv.bias"), 3)
        w = dict(zip("qkv", (m.T for m in np.split(qkv, 3)))) | dict(zip(("qb", "kb", "vb"), biases))
        for short, name in (("o", "attn.proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2")):
            w[short], w[f"{short}b"] = get(f"{at}{name}.weight").T, get(f"{at}{name}.bias")
        for short, name in (("n1", "norm1"), ("n2", "norm2")):
            w[short], w[f"{short}b"] = get(f"{at}{name}.weight"), get(f"{at}{name}.bias")
        return w

    norm = (get(f"{part}norm.weight"), get(f"{part}norm.bias")) if has(f"{part}norm.weight") else None
    if part:
        embed, output = get("decoder_embed.weight").T, (get("decoder_pred.weight").T, get("decoder_pred.bias"))
        return Stack(embed, get("decoder_embed.bias"), get("decoder_pos_embed"), get("mask_token"), block,
                     f["decoder_depth"], f["decoder_heads"], norm, output)  # fmt: skip
    cls = get("cls_token") if f["cls_token"] else None
    embed = _torch_patch(get("patch_embed.proj.weight"))
    bias = get("patch_embed.proj.bias")
    return Stack(embed, bias, get("pos_embed"), cls, block, f["depth"], f["heads"], norm)


def hub(get: Get, f: dict[str, Any], has: Callable[[str], bool], part: str = "") -> Stack:
    """Hugging Face's names, as its hub's files have them; `part` is "decoder_" for the decoder."""
    vit = "vit." if has("vit.embeddings.cls_token") else ""

    def block(i: int) -> Block:
        at = f"decoder.decoder_layers.{i}." if part else f"{vit}encoder.layer.{i}."
        w = {}
        for short, name in (
            ("q", "attention.attention.query"), ("k", "attention.attention.key"), ("v", "attention.attention.value"),
            ("o", "attention.output.dense"), ("up", "intermediate.dense"), ("down", "output.dense"),
        ):  # fmt: skip
            w[short], w[f"{short}b"] = get(f"{at}{name}.weight").T, get(f"{at}{name}.bias")
        for short, name in (("n1", "layernorm_before"), ("n2", "layernorm_after")):
            w[short], w[f"{short}b"] = get(f"{at}{name}.weight"), get(f"{at}{name}.bias")
        return w

    if part:
        linear = [
            (get(f"decoder.decoder_{name}.weight").T, get(f"decoder.decoder_{name}.bias")) for name in ("embed", "pred")
        ]
        norm = (get("decoder.decoder_norm.weight"), get("decoder.decoder_norm.bias"))
        return Stack(*linear[0], get("decoder.decoder_pos_embed"), get("decoder.mask_token"), block,
                     f["decoder_depth"], f["decoder_heads"], norm, linear[1])  # fmt: skip
    at = f"{vit}embeddings."
    embed = _torch_patch(get(f"{at}patch_embeddings.projection.weight"))
    norm = (get(f"{vit}layernorm.weight"), get(f"{vit}layernorm.bias"))
    return Stack(embed, get(f"{at}patch_embeddings.projection.bias"), get(f"{at}position_embeddings"),
                 get(f"{at}cls_token"), block, f["depth"], f["heads"], norm)  # fmt: skip


def flax_vit(get: Get, f: dict[str, Any], approximate: bool) -> Stack:
    """big_vision's names."""

    def block(i: int) -> Block:
        at = f"params/Transformer/encoderblock_{i}/"
        attention = f"{at}MultiHeadDotProductAttention_0/"
        d = f["width"]
        w = {"o": get(f"{attention}out/kernel").reshape(d, d), "ob": get(f"{attention}out/bias")}
        for short, name in zip("qkv", ("query", "key", "value")):
            w[short] = get(f"{attention}{name}/kernel").reshape(d, d)
            w[f"{short}b"] = get(f"{attention}{name}/bias").reshape(d)
        for short, name in (("up", "MlpBlock_0/Dense_0"), ("down", "MlpBlock_0/Dense_1")):
            w[short], w[f"{short}b"] = get(f"{at}{name}/kernel"), get(f"{at}{name}/bias")
        for short, name in (("n1", "LayerNorm_0"), ("n2", "LayerNorm_1")):
            w[short], w[f"{short}b"] = get(f"{at}{name}/scale"), get(f"{at}{name}/bias")
        return w

    table, cls = get("params/pos_embedding"), get("params/cls") if f["cls_token"] else None
    if cls is not None:
        table = np.concatenate([np.zeros_like(cls), table], axis=1)
    kernel = get("params/embedding/kernel")
    norm = tuple(get(f"params/Transformer/encoder_norm/{name}") for name in ("scale", "bias"))
    return Stack(kernel.reshape(-1, kernel.shape[-1]), get("params/embedding/bias"), table, cls, block, f["depth"],
                 f["heads"], (norm[0], norm[1]), approximate=approximate)  # fmt: skip


def own(get: Get, f: dict[str, Any], part: str = "encoder") -> Stack:
    """This project's names: blocks are stacked."""
    stacked: dict[str, np.ndarray] = {}

    def block(i: int) -> Block:
        def of(name: str) -> np.ndarray:
            if name not in stacked:
                stacked[name] = get(f"{part}/blocks/block/{name}")
            return stacked[name][i]

        kernel, bias = of("attn/qkv/kernel"), of("attn/qkv/bias")
        d = len(kernel)
        w = {"o": of("attn/proj/kernel").reshape(d, d), "ob": of("attn/proj/bias")}
        for j, short in enumerate("qkv"):
            w[short], w[f"{short}b"] = kernel[:, j].reshape(d, d), bias[j].reshape(d)
        for short, name in (("up", "mlp/fc1"), ("down", "mlp/fc2")):
            w[short], w[f"{short}b"] = of(f"{name}/kernel"), of(f"{name}/bias")
        for short, name in (("n1", "norm1"), ("n2", "norm2")):
            w[short], w[f"{short}b"] = of(f"{name}/scale"), of(f"{name}/bias")
        return w

    encoder = part == "encoder"
    d, depth, heads = (f["width"], f["depth"], f["heads"]) if encoder else (
        f["decoder_width"], f["decoder_depth"], f["decoder_heads"])  # fmt: skip
    place = get(f"{part}/pos_embed") if f["learned"] and encoder else sine_cosine(f, d)
    token = None if encoder and not f["cls_token"] else get(f"{part}/{'cls' if encoder else 'mask'}_token")
    norm = None if f["fc_norm"] and encoder else (get(f"{part}/norm/scale"), get(f"{part}/norm/bias"))
    output = None if encoder else (get("decoder/pred/kernel"), get("decoder/pred/bias"))
    return Stack(
        get(f"{part}/embed/kernel"), get(f"{part}/embed/bias"), place, token, block, depth, heads, norm, output
    )


def sine_cosine(f: dict[str, Any], d: int) -> np.ndarray:
    """The fixed table (1 [1+]n d): columns in the first half of the channels, rows in the second, each sin then cos."""
    (h, w), (p, q) = f["image"], f["patch"]
    rows = []
    for r in range(h // p):
        for s in range(w // q):
            angles = [place / 10000 ** (i / (d // 4)) for place in (s, r) for i in range(d // 4)]
            half = d // 4
            rows.append(np.concatenate([np.sin(angles[:half]), np.cos(angles[:half]),
                                        np.sin(angles[half:]), np.cos(angles[half:])]))  # fmt: skip
    first = [np.zeros(d)] * int(f["cls_token"])
    return np.asarray([first + rows], np.float32)
