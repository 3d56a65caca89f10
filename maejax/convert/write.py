"""Weights into a folder that another tool takes, or into a run; a folder is complete or is not there.

Everything is checked before anything is written. Then a draft beside the target is filled, verified if that was asked
for, and renamed.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from maejax import config as configs
from maejax.convert import big_vision, cards, facebook, files, huggingface, onnx, timm
from maejax.convert.files import Pending
from maejax.convert.names import Line, Rule, lines
from maejax.convert.weights import Weights, facts, patch_of, with_tables
from maejax.errors import UsageError

# What can be written, and what it is.
FORMATS: dict[str, str] = {
    "timm": 'encoder, for timm.create_model("local-dir:OUT", pretrained=True)',
    "huggingface": "ViTMAEForPreTraining; with --encoder-only, ViTModel",
    "facebook": "the official code's names, with the decoder if there is one",
    "safetensors": "this project's own names, every parameter",
    "big_vision": "encoder, .npz",
    "onnx": "encoder, a graph that onnxruntime runs",
}
WITH_DECODER = ("huggingface", "facebook", "safetensors")


def chosen(weights: Weights, format: str, encoder_only: bool) -> tuple[Weights, tuple[str, ...]]:
    """What of a network goes into a format, and the parts that stay behind."""
    keep_decoder = format in WITH_DECODER and not encoder_only
    dropped = {"decoder"} if not keep_decoder else set()
    if format in ("huggingface", "big_vision", "onnx"):
        dropped |= {"head"} if "encoder/norm/scale" in weights.arrays else set()
    if format == "huggingface" and not encoder_only and "decoder" not in weights.parts:
        raise UsageError("there is no decoder, which ViTMAEForPreTraining needs; use --encoder-only for a ViTModel")
    if keep_decoder and "decoder" in weights.parts and weights.config.decoder.kind == "cross":
        raise UsageError(f"a decoder of decoder.kind=cross has no place in --to={format}; use --encoder-only")
    kept = {name: array for name, array in weights.arrays.items() if name.split("/")[0] not in dropped}
    left = tuple(sorted(weights.parts & dropped))
    return Weights(weights.config, kept, weights.origin), left


def table_of(weights: Weights, format: str, encoder_only: bool) -> list[Rule]:
    """The names of a format; raises UsageError for a network that it cannot hold."""
    c = weights.config
    if not c.model.cls_token and format in ("huggingface", "facebook"):
        raise UsageError(f"encoder/cls_token is missing: --to={format} needs an encoder with a class token")
    if format == "safetensors":
        return [Rule(name, name) for name in weights.arrays]
    if format == "huggingface" and not encoder_only:
        (h, w), (p, q) = configs.pair(c.image_size), configs.pair(c.model.patch)
        if h != w or p != q:
            raise UsageError(f"ViTMAE takes square images and patches, not {h}x{w} in {p}x{q}; use --encoder-only")
        return huggingface.TABLE
    return {
        "timm": timm.TABLE, "huggingface": huggingface.ENCODER_TABLE, "facebook": facebook.TABLE,
        "big_vision": big_vision.TABLE, "onnx": onnx.TABLE,
    }[format]  # fmt: skip


def plan(weights: Weights, format: str, encoder_only: bool) -> tuple[list[Line], list[Pending]]:
    """Every tensor to be written; raises UsageError if one is left over on either side."""
    c, table = weights.config, table_of(weights, format, encoder_only)
    arrays = dict(weights.arrays) if format == "safetensors" else with_tables(weights)
    if format == "big_vision" and c.model.cls_token:  # its table has no row for the class token
        if arrays["encoder/pos_embed"][:, :1].any():
            raise UsageError("encoder/pos_embed has a position for the class token, which big_vision's table has not")
        arrays["encoder/pos_embed"] = arrays["encoder/pos_embed"][:, 1:]
    shapes = {name: array.shape for name, array in arrays.items()}
    for rule in table:  # a part that is there must be there entirely
        part = rule.ours.split("/")[0]
        fine_tuned = rule.ours.startswith("encoder/norm/") and "fc_norm" in weights.parts
        if part in weights.parts and rule.ours not in shapes and rule.ours != "encoder/cls_token" and not fine_tuned:
            raise UsageError(f"{rule.ours} is missing, which {format}'s {rule.theirs} is made of")
    if "fc_norm" in weights.parts and format not in ("timm", "facebook", "safetensors"):
        raise UsageError(f"fc_norm/scale has no counterpart in {format}: the network normalises after pooling")
    found = lines(table, shapes, patch_of(c))
    return found, [Pending(line.theirs, line.shape, partial(line.export, arrays, patch_of(c))) for line in found]


def write(weights: Weights, folder: Path, format: str, encoder_only: bool, tensors: list[Pending]) -> None:
    """Fills an existing folder."""
    known, license = facts(weights), weights.origin.get("license")
    notes = {"format": "pt", "maejax": json.dumps(configs.to_dict(weights.config))}
    if license:
        notes["license"] = license
    if format == "big_vision":
        files.write_npz(folder / "model.npz", tensors)
    elif format == "onnx":
        onnx.write(folder, tensors, known)
    else:
        files.write_safetensors(folder / "model.safetensors", tensors, notes)
    if format == "timm":
        _write_json(folder / "config.json", timm.config(known, license))
    if format == "huggingface":
        _write_json(folder / "config.json", huggingface.config(known, encoder_only=encoder_only))
        _write_json(folder / "preprocessor_config.json", huggingface.preprocessor(known))
    (folder / "README.md").write_text(cards.card(known, weights.origin, format, encoder_only))


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


# ---- Folders --------------------------------------------------------------------------------------------------------


def check_target(out: Path) -> None:
    """Raises UsageError unless `out` is new or an empty folder, in a place that can be written to."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give a new folder, nothing is ever overwritten")


@contextlib.contextmanager
def draft(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` if all goes well, and otherwise disappears."""
    check_target(out)
    folder = out.absolute().parent / f".{out.absolute().name}.draft"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield folder
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
