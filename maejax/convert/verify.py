"""Proof that converted weights are the same function: both networks on the same images, under the same mask.

The other side is the real library where it is installed and imports; otherwise `forward`, the network in plain numpy.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maejax import build
from maejax import config as configs
from maejax.convert import files, forward, huggingface
from maejax.convert.weights import Weights, facts
from maejax.errors import MaejaxError

TOLERANCE = 1e-3  # of the largest feature, at least 1; float32 on different libraries stays well below
IMAGES = 2


class NotTheSame(MaejaxError):
    """The two networks compute different things."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What both networks see: `pixels` normalised float32 (b h w c), `order` of the patches (b n), `v` visible."""

    images: np.ndarray
    pixels: np.ndarray
    order: np.ndarray
    v: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """Tokens of the whole images (b [1+]n d), and the loss if there is a decoder; `by` whom."""

    features: np.ndarray
    loss: float | None
    by: str
    note: str = ""


def verify(weights: Weights, where: Path, format: str) -> str:
    """Compares a network with files of a format, folder or file; raises NotTheSame if they differ."""
    probe, known = make_probe(weights), facts(weights)
    ours = answer(weights, probe)
    theirs = other(weights, where, format, known, probe)
    difference = float(np.abs(ours.features - theirs.features).max())
    said = f"features differ by at most {difference:.1e}"
    if not difference <= TOLERANCE * max(1.0, float(np.abs(theirs.features).max())):
        raise NotTheSame(f"{where} is not the same network by {theirs.by}: {said}")
    if ours.loss is not None and theirs.loss is not None:
        difference = abs(ours.loss - theirs.loss)
        said += f", the loss under one mask by {difference:.1e} ({theirs.loss:.6f})"
        if not difference <= TOLERANCE * max(1.0, abs(theirs.loss)):
            raise NotTheSame(f"{where} is not the same network by {theirs.by}: {said}")
    return f"{theirs.by}: {said}{theirs.note}"


def make_probe(weights: Weights, seed: int = 0) -> Probe:
    """Random images and a random mask of the config's ratio."""
    s, rng = build.shapes_of(weights.config), np.random.default_rng(seed)
    images = rng.integers(0, 256, (IMAGES, *s.image, s.channels), dtype=np.uint8)
    mean, std = (np.asarray(facts(weights)[name], np.float32) for name in ("mean", "std"))
    pixels = (images.astype(np.float32) / np.float32(255) - mean) / std
    order = np.argsort(rng.random((IMAGES, s.patches)), axis=1).astype(np.int32)
    return Probe(images, pixels, order, s.visible)


def answer(weights: Weights, probe: Probe) -> Answer:
    """What this project computes, in float32 whatever the config says."""
    c = configs.from_dict(configs.to_dict(weights.config) | {"dtype": "float32"})
    objective: Any = build.make_objective(c)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda params, pixels: objective.encoder.apply({"params": params}, pixels))
        features = np.asarray(apply(weights.tree["encoder"], probe.pixels))
        loss = None
        if "decoder" in weights.parts:
            batch = {"image": probe.images, "visible": probe.order[:, : probe.v], "masked": probe.order[:, probe.v :]}
            tree = {part: weights.tree[part] for part in ("encoder", "decoder")}
            loss = float(jax.jit(lambda params: objective.apply({"params": params}, batch)[0])(tree))
    return Answer(features, loss, "maejax")


def other(weights: Weights, where: Path, format: str, known: dict[str, Any], probe: Probe) -> Answer:
    """What the library of a format makes of its files, or numpy."""
    library: dict[str, Callable[[Weights, Path, Probe], Answer]] = {
        "timm": _timm, "huggingface": _huggingface, "onnx": _onnx
    }  # fmt: skip
    why = ""
    if format in library and where.is_dir():
        try:
            return library[format](weights, where, probe)
        except (ImportError, RuntimeError) as error:
            if not isinstance(error, ImportError) and "import" not in str(error):
                raise
            why = f" ({format}'s library cannot be imported: {str(error).splitlines()[0]})"
    found = by_numpy(where, format, known, probe)
    return dataclasses.replace(found, note=found.note + why)


def _timm(weights: Weights, where: Path, probe: Probe) -> Answer:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{where}", pretrained=True).eval()
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(_channels_first(probe.pixels))).numpy()
    return Answer(features, None, f"timm {timm.__version__}")


def _huggingface(weights: Weights, where: Path, probe: Probe) -> Answer:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pixels, by = torch.from_numpy(_channels_first(probe.pixels)), f"transformers {transformers.__version__}"
    with torch.no_grad():
        if "decoder" not in weights.parts:
            model = transformers.ViTModel.from_pretrained(where, add_pooling_layer=False).eval()
            return Answer(model(pixels).last_hidden_state.numpy(), None, by)
        model = transformers.ViTMAEForPreTraining.from_pretrained(where).eval()
        noise = np.argsort(probe.order, axis=1).astype(np.float32)  # its mask keeps the patches of least noise
        loss = float(model(pixels, noise=torch.from_numpy(noise)).loss)
        model.config.mask_ratio = model.vit.config.mask_ratio = 0.0
        whole = np.tile(np.arange(probe.order.shape[1], dtype=np.float32), (len(noise), 1))
        features = model.vit(pixels, noise=torch.from_numpy(whole)).last_hidden_state.numpy()
    return Answer(features, loss, by)


def _onnx(weights: Weights, where: Path, probe: Probe) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(where / "model.onnx"), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": _channels_first(probe.pixels)})
    return Answer(features, None, f"onnxruntime {onnxruntime.__version__}")


def by_numpy(where: Path, format: str, known: dict[str, Any], probe: Probe) -> Answer:
    """The network of a file, in plain numpy."""
    file = where
    if where.is_dir():
        file = where / ("model.npz" if format == "big_vision" else "model.safetensors")
        if not file.is_file():
            file = where / "pytorch_model.bin"
    tensors, _ = files.open_tensors(file)
    names = {name.removeprefix("module."): name for name in tensors}
    if format == "huggingface":
        names = huggingface.canonical(tensors)
        if not any(name.startswith("decoder.") for name in names):  # canonical names have the prefix
            names = {name: own for name, own in names.items() if not name.startswith("vit.pooler.")}

    def get(name: str) -> np.ndarray:
        return files.read(file, names[name], tensors[names[name]])

    def has(name: str) -> bool:
        return name in names

    p, q = known["patch"]
    patches = forward.cut(probe.pixels, p, q)
    make: dict[str, Callable[..., forward.Stack]] = {"huggingface": forward.hub}
    decoder = None
    note = ""
    if format == "safetensors":
        encoder = forward.own(get, known)
        decoder = forward.own(get, known, "decoder") if has("decoder/mask_token") else None
    elif format == "big_vision":
        encoder = forward.flax_vit(get, known, approximate=False)
        tanh = forward.encode(forward.flax_vit(get, known, approximate=True), patches)
        note = f"; with big_vision's approximate GELU by {np.abs(tanh - forward.encode(encoder, patches)).max():.1e}"
    else:
        read = make.get(format, forward.official)
        encoder = read(get, known, has)
        with_decoder = has("mask_token") or has("decoder.mask_token")
        decoder = read(get, known, has, "decoder_") if with_decoder else None
    loss = None
    if decoder is not None:
        loss = forward.loss(encoder, decoder, patches, probe.order, probe.v, known["norm_pix"])
    return Answer(forward.encode(encoder, patches), loss, "numpy", note)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
