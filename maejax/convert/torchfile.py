"""PyTorch's .pth files, read without PyTorch: the zip file of PyTorch 1.6 and later, and the older container.

What is in them is told by a pickle, which `unpickle` understands without running it.
"""

import dataclasses
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maejax.convert.unpickle import BadFile, Storage, View, run

LONGEST_PROGRAM = 16 * 2**20  # bytes; ViT-H's pickle has 70 thousand
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` gives its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


def open_zip(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        program = next(name for name in members if name.endswith("/data.pkl"))
        folder = program.removesuffix("data.pkl")
        for info in members.values():
            if info.compress_type != zipfile.ZIP_STORED:
                raise BadFile(f"{info.filename} is compressed, which PyTorch never does")
        if members[program].file_size > LONGEST_PROGRAM:
            raise BadFile(f"{program} has {members[program].file_size:,} bytes, more than {LONGEST_PROGRAM:,}")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise BadFile("its numbers are big-endian; save it again on a little-endian machine")
        content = run(io.BytesIO(archive.read(program)))

    def raw(storage: Storage) -> np.ndarray:
        with zipfile.ZipFile(path) as archive:
            return np.frombuffer(archive.read(f"{folder}data/{storage.key}"), storage.dtype)

    def size(storage: Storage) -> int:
        info = members.get(f"{folder}data/{storage.key}")
        if info is None:
            raise BadFile(f"its storage {folder}data/{storage.key} is missing")
        return info.file_size

    return _tensors(content, size, raw, path.stat().st_size)


def open_legacy(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file from before PyTorch 1.6 (or saved as such)."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(min(LONGEST_PROGRAM, path.stat().st_size)))
    if run(head) != LEGACY_MAGIC:
        raise BadFile("it is a pickle, but not PyTorch's")
    run(head), run(head)  # version and machine
    content, keys = run(head), run(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadFile("its list of storages is damaged")
    described = {view.storage.key: view.storage for _, view in _views(content)}
    end, at = path.stat().st_size, head.tell()
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for key in keys:  # each: the number of values, then the values
            file.seek(at)
            count = file.read(8)
            storage = described.get(key)
            if len(count) < 8 or storage is None or struct.unpack("<q", count)[0] != storage.numel:
                raise BadFile(f"its storage {key} is missing or has another size than its tensors say")
            places[key] = (at + 8, storage.numel * storage.dtype.itemsize)
            at += 8 + places[key][1]
            if at > end:
                raise BadFile(f"it is cut short inside storage {key}")

    def raw(storage: Storage) -> np.ndarray:
        offset, length = places[storage.key]
        with path.open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(length), storage.dtype)

    return _tensors(content, lambda storage: places.get(storage.key, (0, 0))[1], raw, end)


def _tensors(
    content: Any, size: Callable[[Storage], int], raw: Callable[[Storage], np.ndarray], limit: int
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    total = 0
    for name, view in _views(content):
        itemsize, numel = view.storage.dtype.itemsize, math.prod(view.shape)
        last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides)) if numel else 0
        held = size(view.storage)
        total += numel * itemsize
        if held != view.storage.numel * itemsize or last >= max(view.storage.numel, 1) or total > limit:
            raise BadFile(f"tensor {name} claims shape {view.shape}, its storage has {held:,} bytes")

        def read(view: View = view) -> np.ndarray:
            values = raw(view.storage)[view.offset :]
            strides = tuple(stride * values.itemsize for stride in view.strides)
            return np.lib.stride_tricks.as_strided(values, view.shape, strides, writeable=False)

        found[name] = Tensor(view.shape, view.storage.dtype, read)
    if not found:
        raise BadFile("it holds no tensors by name")
    return found


def _views(content: Any) -> Iterator[tuple[str, View]]:
    """The tensors of a state dict, which may lie under "model" or "state_dict" beside other things."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise BadFile(f"it holds a {type(content).__name__.strip('_').lower()}, expected a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(value, View):
            raise BadFile(f"its entry {str(name)[:60]} is not a tensor; expected a dictionary of tensors")
        yield str(name), value
