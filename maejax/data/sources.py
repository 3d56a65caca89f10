"""Where images come from: anything with a length whose records are `{"image": bytes or uint8 (h w c), "label": int}`.

A spec names one: `digits`, a folder, `tfds:NAME`, `arrayrecord:GLOB`, or `package.module:Class` for one's own, which is
called with `split=`. To add a source here, write a class with the members of `Source` and a line in `SOURCES`.
"""

import contextlib
import functools
import glob
import hashlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maejax.data.content import digest_of, sample_of, size_of
from maejax.data.decode import BadImage, parse_record
from maejax.data.files import SUFFIXES, image_files, read_image_file
from maejax.data.packed import pattern_of_pack, read_manifest
from maejax.data.transforms import read_record
from maejax.errors import UsageError, import_object

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders that are no classes
LOOKED_AT = 10_000  # records of ArrayRecord files, for their labels


class Source(Protocol):
    """Random access to records. It is sent to worker processes, so it must be picklable and cheap to copy."""

    num_classes: int | None  # k if every record has a "label" in 0 .. k-1, else None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record; OSError or BadImage if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What people know the record by."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that identify the records and their order, wherever they lie."""
        ...


class Digits:
    """The 1,797 handwritten digits (8 x 8, grey) inside scikit-learn; every fifth is "test", the others are "train"."""

    num_classes: int | None = 10

    def __init__(self, *, split: str):
        from sklearn.datasets import load_digits

        if split not in ("train", "test", "all"):
            raise UsageError(f"digits has no split {split!r}; its splits are train, test, all")
        digits = load_digits()
        place = np.arange(len(digits.target)) % 5 == 4
        chosen = np.flatnonzero({"train": ~place, "test": place, "all": place | True}[split])
        self._split, self._numbers = split, chosen
        self._images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        self._labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        """The digit's number in load_digits()."""
        return f"digit {self._numbers[index]}"

    def fingerprint(self) -> str:
        """Of pixels and labels."""
        return hashlib.sha256(self._images.tobytes() + self._labels.astype(np.int64).tobytes()).hexdigest()[:16]


class Folder:
    """All image files below a folder, sorted by path; hidden ones are left out.

    If the folder has a subfolder named as the split, only that is read. If every image lies in a subfolder, and there
    are several of these, they are the classes; if they are named like splits, the split must be one of them.
    """

    def __init__(self, path: str | Path, *, split: str = ""):
        root = Path(path).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise UsageError(f"{root} {what}; give a folder of images")
        self._root = root / split if split and (root / split).is_dir() else root
        self._paths = sorted(image_files(self._root))
        if not self._paths:
            raise UsageError(f"no image file in {self._root}; looked for {' '.join(SUFFIXES)}, in subfolders too")
        tops = [path.partition("/")[0] for path in self._paths if "/" in path]
        classes = sorted(set(tops))
        if split and self._root == root and set(classes) <= SPLITS and len(tops) == len(self._paths):
            raise UsageError(
                f"{root} has {' and '.join(classes)}, and no {split!r}; set --config.data.split and "
                "--config.data.eval_split"
            )
        labelled = len(tops) == len(self._paths) and len(classes) > 1
        self.num_classes = len(classes) if labelled else None
        self.classes = tuple(classes) if labelled else ()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        record: dict[str, Any] = {"image": read_image_file(self._root / path)}
        if self.num_classes:
            record["label"] = self.classes.index(path.partition("/")[0])
        return record

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self._paths[index]

    @functools.cache  # noqa: B019 - a source lives as long as its run
    def fingerprint(self) -> str:
        """Of relative paths, sizes and a sample of the content."""
        files = [self._root / path for path in self._paths]
        sizes = (f"{path} {size_of(file)}" for path, file in zip(self._paths, files, strict=True))
        return digest_of(*sizes, sample_of(files))


class Tfds:
    """A dataset that TFDS has prepared as ArrayRecord; read without TensorFlow, images left encoded."""

    def __init__(self, name: str, *, split: str, data_dir: str | None):
        tfds = _import_tfds()
        where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        known = sorted(path.name for path in Path(where).expanduser().glob("*") if path.is_dir())
        try:
            builder = tfds.builder(name, data_dir=str(Path(where).expanduser()))
            prepared = builder.info.splits
        except Exception as error:  # unknown names, versions, files: each its own class
            raise UsageError(_cannot_read(name, where, known, error)) from error
        if not prepared:
            raise UsageError(_cannot_read(name, where, known, None))
        try:
            self._records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except Exception as error:
            if split not in prepared:
                raise UsageError(f"tfds:{name} has no split {split!r}; its splits are {', '.join(prepared)}") from error
            raise UsageError(_cannot_read(name, where, known, error)) from error
        features = builder.info.features
        if "image" not in features:
            raise UsageError(f"tfds:{name} has no feature 'image'; its features are {', '.join(features)}")
        label = features["label"] if "label" in features else None
        self.num_classes = getattr(label, "num_classes", None)
        self._id = f"{builder.info.full_name} {split} {len(self._records)}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = _read(self._records, index)
        return {key: record[key] for key in ("image", "label") if key in record}

    def name(self, index: int) -> str:
        """Dataset, split and number."""
        return f"{self._id.rpartition(' ')[0]} #{index}"

    def fingerprint(self) -> str:
        """Of name, version, split and number of records."""
        return digest_of(self._id)


def _read(records: Any, index: int) -> Any:
    """`records[index]`; what a library raises of a damaged file becomes a bad image."""
    try:
        return records[index]
    except IndexError:  # how Python ends a loop over a sequence
        raise
    except Exception as error:
        raise BadImage("unreadable", str(error).partition("\n")[0]) from error


def _cannot_read(name: str, where: str, known: list[str], error: Exception | None) -> str:
    reason = f" ({str(error).splitlines()[0].strip()})" if error and str(error) else ""
    there = f"there are: {', '.join(known)}" if known else "it is empty or missing"
    return (
        f"tfds:{name} is not prepared as ArrayRecord in {where}{reason}; {there}. Set --config.data.dir or "
        "TFDS_DATA_DIR, or prepare it with TFDS's download_and_prepare(file_format='array_record')"
    )


def _import_tfds() -> Any:
    # TFDS warns through absl's logger when TensorFlow is not there, which is as we want it.
    with contextlib.suppress(Exception):
        logging.getLogger("absl").setLevel(logging.ERROR)
    return importlib.import_module("tensorflow_datasets")


class ArrayRecords:
    """ArrayRecord files whose records are encoded images, or tf.train.Examples with an image in them.

    The classes are counted in at most LOOKED_AT records, evenly spaced: to read all of them would be to read the data.
    """

    num_classes: int | None

    def __init__(self, pattern: str):
        self._paths = sorted(glob.glob(str(Path(pattern).expanduser())))
        if not self._paths:
            raise UsageError(
                f"no file matches arrayrecord:{pattern}; give a pattern such as '/data/train-*.array_record'"
            )
        try:
            self._length = len(self._open())
        except Exception as error:
            raise UsageError(f"arrayrecord:{pattern} cannot be read: {str(error).splitlines()[0]}") from error
        pack = read_manifest(self._paths[0])
        self.num_classes = pack["num_classes"] if pack else self._count_classes()

    def _count_classes(self) -> int | None:
        """k if every readable record has a label in 0 .. k-1."""
        labels: list[Any] = []
        for i in np.unique(np.linspace(0, self._length - 1, min(self._length, LOOKED_AT)).astype(np.int64)):
            with contextlib.suppress(BadImage):
                labels.append(read_record(self, int(i)).get("label"))
                if labels[-1] is None:  # one without is enough
                    return None
        return max(labels, default=-1) + 1 or None

    def _open(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._paths)

    @functools.cached_property
    def _records(self) -> Any:
        return self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}  # file handles stay here

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse_record(self._records[index])

    def name(self, index: int) -> str:
        """Number of the record."""
        return f"record {index}"

    def fingerprint(self) -> str:
        """Of the files' names and sizes, the number of records and a sample of the content."""
        files = [Path(path) for path in self._paths]
        return digest_of(self._length, *(f"{file.name} {size_of(file)}" for file in files), sample_of(files))


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": lambda rest, split, data_dir: Digits(split=split),
    "folder": lambda rest, split, data_dir: Folder(rest, split=split),
    "tfds": lambda rest, split, data_dir: Tfds(rest, split=split, data_dir=data_dir),
    "arrayrecord": lambda rest, split, data_dir: ArrayRecords(rest),
}


def make_source(spec: str, *, split: str, data_dir: str | None = None) -> Source:
    """The source that `spec` names; raises UsageError if there is none or it has nothing to read."""
    if not spec:
        raise UsageError("data.source is empty; give a folder, or see maejax pretrain --keys")
    try:
        return _make_source(spec, split, data_dir)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has, ...
        shown = spec if len(spec) < 100 else f"{spec[:100]}..."
        raise UsageError(f"data.source={shown} cannot be looked at: {str(error).splitlines()[0]}") from error


def _make_source(spec: str, split: str, data_dir: str | None) -> Source:
    scheme, colon, rest = spec.partition(":")
    if scheme in SOURCES and (colon or scheme == "digits"):
        return SOURCES[scheme](rest, split, data_dir)
    if Path(spec).expanduser().is_dir() or not colon:
        pack = pattern_of_pack(spec) or (pattern_of_pack(f"{spec}/{split}") if split else None)
        return ArrayRecords(pack) if pack else Folder(spec, split=split)
    importable = all(part.isidentifier() for part in scheme.split("."))
    if importable and ("." in scheme or importlib.util.find_spec(scheme)):
        try:
            return import_object(spec, "data.source")(split=split)
        except TypeError as error:
            raise UsageError(f"data.source={spec} cannot be called with split={split!r}: {error}") from error
    raise UsageError(
        f"data.source={spec!r}: unknown scheme {scheme!r}; allowed are digits, a folder, "
        f"{', '.join(f'{name}:...' for name in SOURCES if name != 'digits')}, package.module:Class"
    )
