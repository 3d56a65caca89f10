"""Which file of a folder holds weights, in which format, and what lies beside the tensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from maejax import bounded
from maejax import config as configs
from maejax.convert import big_vision, facebook, files, huggingface
from maejax.convert.names import Rule
from maejax.convert.torchfile import Tensor
from maejax.errors import UsageError

FILES = ("model.safetensors", "pytorch_model.bin", "model.npz")  # in a folder, the first that is there


@dataclasses.dataclass(frozen=True)
class Found:
    """A file of weights, looked at and not yet read."""

    where: Path  # the file
    format: str  # a name in maejax.convert.FORMATS
    tensors: dict[str, Tensor]  # by the names of the format's table
    actual: dict[str, str]  # what the file itself calls them
    table: list[Rule]
    beside: dict[str, Any]  # config.json
    stored: ConfigDict | None  # the config that `maejax convert` left in the file
    license: str | None
    ignored: tuple[str, ...] = ()


def find(source: Path) -> Found:
    """Finds a folder's file, and the format by the names of its tensors."""
    where, beside = source, {}
    if source.is_dir():
        there = [source / name for name in FILES if (source / name).is_file()]
        if not there:
            raise UsageError(f"{source} is not a run of maejax and holds none of {', '.join(FILES)}")
        where, beside = there[0], json_of(source / "config.json")
    elif not source.is_file():
        raise UsageError(f"{source} does not exist; expected a file of weights or a folder")
    tensors, notes = files.open_tensors(where)
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from inside a parallel wrapper
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    stored = _stored_config(where, notes)
    license = notes.get("license") or _license(source, beside)
    actual = {name: name for name in tensors}

    def found(format: str, table: list[Rule], ignored: tuple[str, ...] = ()) -> Found:
        kept = {name: tensors[own] for name, own in actual.items() if name not in ignored}
        return Found(where, format, kept, actual, table, beside, stored, license, ignored)

    if "encoder/embed/kernel" in tensors:
        if stored is None:
            raise UsageError(
                f"{where} has this project's names but not the config that `maejax convert` writes into it"
            )
        return found("safetensors", [Rule(name, name) for name in tensors])
    if any(name.startswith("params/") for name in tensors):
        return found("big_vision", big_vision.TABLE)
    if any("layernorm_before" in name for name in tensors):
        actual = huggingface.canonical(tensors)
        ignored = tuple(name for name in actual if name.removeprefix("vit.") in huggingface.POOLER)
        return found("huggingface", huggingface.TABLE, ignored)
    if any(name.startswith("blocks.0.") for name in tensors):
        tables = (facebook.TABLE, facebook.TABLE_WITHOUT_KEY_BIAS)
        own = any(name.startswith(("decoder_", "mask_token")) for name in tensors) or "architecture" not in beside
        return found("facebook" if own else "timm", tables["blocks.0.attn.q_bias" in tensors])
    first = next(iter(tensors), "none")
    raise UsageError(
        f"{where}: its {len(tensors)} tensors ({first}, ...) have the names of no known format; known are the official "
        "MAE's, timm's, Hugging Face's ViTMAE and ViT, big_vision's and this project's"
    )


def json_of(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = bounded.read_json(file)
    except (ValueError, OSError) as error:
        raise UsageError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _stored_config(where: Path, notes: Mapping[str, str]) -> ConfigDict | None:
    """The config that `maejax convert` left in a file's notes."""
    if "maejax" not in notes:
        return None
    try:
        return configs.from_dict(json.loads(notes["maejax"]))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where}: the config in its header is damaged ({error})") from error


def _license(source: Path, beside: Mapping[str, Any]) -> str | None:
    """What is said about the licence: by the file's official name, by timm's config, by a Hugging Face model card."""
    if facebook.RELEASED.match(source.name):
        return facebook.LICENSE
    pretrained = beside.get("pretrained_cfg")
    if isinstance(pretrained, dict) and isinstance(pretrained.get("license"), str):
        return pretrained["license"] if pretrained["license"] != "unknown" else None
    card = source / "README.md"
    if source.is_dir() and card.is_file():
        with card.open("rb") as file:
            start = file.read(4000).decode(errors="replace")
        for line in start.splitlines():
            if line.startswith("license:"):
                return line.partition(":")[2].strip() or None
    return None
