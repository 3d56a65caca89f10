"""Files of named tensors, without the libraries that made them and without trust: .safetensors, .npz, and .pth.

`open_tensors` reads headers only and checks every size and offset in them against the file before anything is
allocated; a tensor is read when its `read` is called. `write_safetensors` and `write_npz` write one tensor at a time.
So neither side ever needs more memory than one tensor.
"""

import dataclasses
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maejax.convert import torchfile
from maejax.convert.torchfile import Tensor
from maejax.convert.unpickle import BadFile
from maejax.errors import UsageError

Shape = tuple[int, ...]
# What weights may be stored as; all of these fit into float32 exactly.
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
LONGEST_HEADER = 8 * 2**20  # bytes; ViT-H's has 70 thousand


@dataclasses.dataclass(frozen=True)
class Pending:
    """A float32 tensor to be written: `make` gives it when its turn comes."""

    name: str
    shape: Shape
    make: Callable[[], np.ndarray]


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, unread, and the file's own notes.

    Raises UsageError, one line that names the file and what is wrong with it.
    """
    try:
        if not path.is_file():
            raise BadFile("it is not a regular file")
        with path.open("rb") as file:
            start = file.read(9)
        if start[:2] == b"PK":
            return _open_zip(path), {}
        if start[8:9] == b"{":
            return open_safetensors(path)
        if start[:1] == b"\x80":
            return torchfile.open_legacy(path), {}
        raise BadFile("it is no .safetensors, .npz or .pth file (its first bytes are those of none)")
    except BadFile as error:
        raise UsageError(f"{path}: {error}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise UsageError(f"{path} is damaged or cut short: {error}") from error


def read(where: Path, name: str, tensor: Tensor) -> np.ndarray:
    """A tensor as float32; raises UsageError if it holds anything but floating-point numbers, or cannot be read."""
    if tensor.dtype not in FLOATS.values():
        raise UsageError(f"{where}: tensor {name} is {tensor.dtype}, expected float32, float16 or bfloat16")
    try:
        array = tensor.read()
    except (BadFile, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{where}: tensor {name} cannot be read: {error}") from error
    return array.astype(np.float32, copy=False)


def _open_zip(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names):
        return torchfile.open_zip(path)
    if names and all(name.endswith(".npy") for name in names):
        return open_npz(path)
    raise BadFile("it is a zip file, but neither PyTorch's (there is no data.pkl) nor numpy's (not all are .npy)")


# ---- safetensors ----------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a .safetensors file; raises BadFile for a header that does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(LONGEST_HEADER, size - 8):
            raise BadFile(f"its header claims {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"its header is not JSON ({error})") from error
    notes = header.pop("__metadata__", {})
    spans = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _checked_entry(name, entry)
        spans.append((begin, end, name))
        tensors[name] = Tensor(shape, dtype, _reader(path, 8 + length + begin, shape, dtype))
    at = 0
    for begin, end, name in sorted(spans):  # they follow each other without gaps, up to the end of the file
        if begin != at:
            raise BadFile(f"tensor {name} starts at byte {begin:,}, expected {at:,}: tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise BadFile(f"its tensors claim {at:,} bytes, the file holds {size - 8 - length:,}")
    return tensors, notes if isinstance(notes, dict) else {}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _checked_entry(name: str, entry: Any) -> tuple[np.dtype[Any], Shape, int, int]:
    sizes = {**FLOATS, "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"),
             "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}  # fmt: skip
    try:
        dtype, shape, (begin, end) = sizes[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"tensor {name} has an entry that cannot be understood: {str(entry)[:80]}") from error
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise BadFile(f"tensor {name} has an entry that cannot be understood: {str(entry)[:80]}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise BadFile(f"tensor {name} has shape {shape} and {end - begin:,} bytes, which do not fit each other")
    return dtype, shape, begin, end


def _reader(path: Path, offset: int, shape: Shape, dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(raw.data) != raw.nbytes:
                raise BadFile("the file ends inside it")
        return raw.view(dtype).reshape(shape)

    return read


def write_safetensors(path: Path, tensors: Iterable[Pending], notes: Mapping[str, str]) -> None:
    """Writes float32 tensors, made one after the other."""
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    tensors = list(tensors)
    at = 0
    for tensor in tensors:
        end = at + 4 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            file.write(made(tensor).data.cast("B"))


def made(tensor: Pending) -> np.ndarray:
    """The tensor, contiguous float32 of the shape that was announced."""
    array = np.ascontiguousarray(tensor.make(), "<f4")
    assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
    return array


# ---- npz ------------------------------------------------------------------------------------------------------------


def open_npz(path: Path) -> dict[str, Tensor]:
    """Tensors of an .npz file of plain arrays; objects, which numpy would unpickle, are refused unread."""
    size = path.stat().st_size
    tensors, total = {}, 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise BadFile(f"{info.filename} is compressed; save it with numpy.savez, which does not compress")
            with archive.open(info) as member:
                shape, fortran, dtype = _npy_header(io.BytesIO(member.read(2**16)), info.filename)
            total += math.prod(shape) * dtype.itemsize
            if math.prod(shape) * dtype.itemsize > info.file_size or total > size:
                raise BadFile(f"{info.filename} claims shape {shape}, more than its {info.file_size:,} bytes hold")
            tensors[name] = Tensor(shape, dtype, _npy_reader(path, info.filename, shape, dtype, fortran))
    return tensors


def _npy_header(head: io.BytesIO, name: str) -> tuple[Shape, bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(head)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(head)
    except (ValueError, SyntaxError, EOFError, OverflowError) as error:
        raise BadFile(f"{name} has a damaged header ({str(error).splitlines()[0]})") from error
    if dtype.hasobject:
        raise BadFile(f"{name} holds Python objects, which are never unpickled; expected numbers")
    return shape, fortran, dtype


def _npy_reader(path: Path, member: str, shape: Shape, dtype: np.dtype[Any], fortran: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(member)
        count = math.prod(shape)
        flat = np.frombuffer(raw, dtype, count, offset=len(raw) - count * dtype.itemsize)
        return flat.reshape(shape, order="F" if fortran else "C")

    return read


def write_npz(path: Path, tensors: Iterable[Pending]) -> None:
    """Writes float32 tensors as numpy.savez does, one after the other."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for tensor in tensors:
            with archive.open(zipfile.ZipInfo(f"{tensor.name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, made(tensor), allow_pickle=False)
