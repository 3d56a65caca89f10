"""The pickle inside a .pth file, understood without running it.

A pickle is a program, which may call any Python function. Here it meets a machine that has no functions. It knows the
two dozen instructions that a dictionary of tensors is written with, and four kinds of names: the two that rebuild a
tensor, `OrderedDict`, and the storages. The whole program is looked through before its first instruction is carried
out; any other name or instruction is refused, by its name.
"""

import dataclasses
import io
import itertools
import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

MOST_STEPS = 1_000_000  # ViT-H's file takes 20 thousand
STORAGES = {
    "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
ALLOWED = {"collections OrderedDict", *REBUILD, *(f"torch {name}" for name in STORAGES)}


class BadFile(Exception):
    """A file of tensors that is not what it claims to be; the message goes after the file's name."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name in a pickle. It stands for a function or class, and is neither."""

    path: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of `numel` values, by its key in the file."""

    dtype: np.dtype[Any]
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as a pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def run(program: io.BytesIO) -> Any:
    """What a pickle describes, in plain dicts, lists, tuples, numbers, strings and `View`s.

    `program` is left behind the pickle. Raises BadFile for whatever else is in it, before anything of it is done.
    """
    try:
        steps = [
            (code.name, argument) for code, argument, _ in itertools.islice(pickletools.genops(program), MOST_STEPS)
        ]
    except (ValueError, IndexError, UnicodeError, struct.error, EOFError) as error:
        raise BadFile(f"its pickle is damaged or cut short ({str(error)[:60]})") from error
    if steps[-1][0] != "STOP":
        raise BadFile(f"its pickle has more than {MOST_STEPS:,} instructions")
    strings: list[str] = []
    for name, argument in steps:
        if name in ("GLOBAL", "INST") and argument not in ALLOWED:
            raise BadFile(_refusal(str(argument)))
        if name == "STACK_GLOBAL":  # its two operands come from the stack: the last two strings, if it is honest
            if " ".join(strings[-2:]) not in ALLOWED:
                raise BadFile(_refusal(" ".join(strings[-2:])))
        elif name not in _PUSHES and name not in _CONSTANTS and name not in _STEPS:
            raise BadFile(f"its pickle uses the instruction {name}, which a dictionary of tensors does not need")
        if "UNICODE" in name:
            strings.append(str(argument))
    machine = _Machine()
    try:
        for name, argument in steps:
            machine.step(name, argument)
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"its pickle makes no sense as a dictionary of tensors ({type(error).__name__})") from error
    return result


def _refusal(name: str) -> str:
    named = re.sub(r"[^\w.]+", ".", name)[:80]
    return (
        f"it would run {named}, which is refused: only tensors and ordered dictionaries are read; "
        "save the state dict alone, torch.save({'model': model.state_dict()}, FILE)"
    )


_PUSHES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "INT", "LONG"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STEPS = {
    "PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "TUPLE",
    "REDUCE", "BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "BINPERSID", *_TUPLES,
}  # fmt: skip
_MARK = object()


class _Machine:
    """A stack, a memo, and no way to call anything."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        stack = self.stack
        if name in _PUSHES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if f"{module} {attribute}" not in ALLOWED:
                raise BadFile(_refusal(f"{module} {attribute}"))
            stack.append(_Name(f"{module} {attribute}"))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = [stack.pop() for _ in range(count)][::-1]
            stack.append(tuple(items))
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("SETITEM", "APPEND"):
            self._put(name, [stack.pop() for _ in range(1 + (name == "SETITEM"))][::-1])
        elif name in ("SETITEMS", "APPENDS"):
            self._put(name, self._to_mark())
        elif name == "BUILD":  # attributes of an OrderedDict, such as _metadata: of no use here
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise BadFile("its pickle sets attributes of something that is no dictionary")
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_rebuilt(function, arguments))

    def _to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _put(self, name: str, items: list[Any]) -> None:
        target = self.stack[-1]
        if name.startswith("SETITEM") and isinstance(target, dict):
            if not all(isinstance(key, str | int) for key in items[::2]):
                raise BadFile("its pickle has a dictionary whose keys are neither names nor numbers")
            target.update(zip(items[::2], items[1::2], strict=True))
        elif name.startswith("APPEND") and isinstance(target, list):
            target.extend(items)
        else:
            raise BadFile("its pickle fills something that is neither a dictionary nor a list")


def _storage(description: Any) -> Storage:
    kind, storage_type, key, _, numel, *_ = description
    dtype = STORAGES[storage_type.path.removeprefix("torch ")]
    if kind != "storage" or not re.fullmatch(r"\w+", key) or not (type(numel) is int and numel >= 0):
        raise BadFile(f"its storage {str(key)[:40]} is described in a way that PyTorch does not write")
    return Storage(dtype, key, numel)


def _rebuilt(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name):
        raise BadFile(f"its pickle calls a {type(function).__name__.strip('_').lower()}")
    if function.path == "collections OrderedDict":
        if arguments:
            raise BadFile("its pickle makes an OrderedDict of something")
        return {}
    if function.path == "torch._utils _rebuild_parameter" and isinstance(arguments[0], View):
        return arguments[0]
    if function.path == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides, *_ = arguments
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise BadFile("it has a tensor that is described in a way that PyTorch does not write")
        if len(shape) != len(strides) or len(shape) > 8:
            raise BadFile("it has a tensor whose shape and strides do not fit each other")
        return View(storage, offset, tuple(shape), tuple(strides))
    raise BadFile(_refusal(function.path))
