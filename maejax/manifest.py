"""Manifests: what proves that a checkpoint is the one that was written.

`manifest.json` holds the step, what else is to be known, and the digest of every file; its last line is the digest of
itself. It is written after everything else, so a checkpoint without one does not exist.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maejax import bounded
from maejax.errors import UsageError
from maejax.faults import fault_point

MANIFEST = "manifest.json"
FORMAT = 2
CHUNKS = {1: 1 << 60, 2: 64 << 20}  # by the formats that can be read: bytes that one thread hashes at a time
THREADS = min(os.cpu_count() or 1, 16)


class CorruptCheckpoint(Exception):
    """A checkpoint's files are not those that were written; the message says which and how."""


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Seals a checkpoint: its manifest with `content` and the digest of every file, all of it on the disk for good."""
    fault_point("seal.hash")
    files = digests(folder, list(_files(folder)), durable=True)
    body = json.dumps({**content, "format": FORMAT, "files": files}, indent=1).encode()
    draft = folder / f"{MANIFEST}.draft"
    fault_point("seal.draft")
    with draft.open("wb") as out:
        out.write(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
        out.flush()
        fault_point("seal.sync")
        os.fsync(out.fileno())
    for below in {(folder / name).parent for name in files} - {folder}:
        _sync(below)
    fault_point("seal.rename")
    draft.rename(folder / MANIFEST)
    fault_point("seal.renamed")
    _sync(folder)
    _sync(folder.parent)  # it holds the name that Orbax gave the checkpoint
    fault_point("seal.done")


def verify(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest, if that and all files are as written.

    Raises:
      CorruptCheckpoint: they are not, or they are those of another step.
      UsageError: the checkpoint was written by a maejax of another format.
    """
    content = _read(folder)
    expected = content["files"]
    there = set(_files(folder)) - {MANIFEST}
    for name in sorted(there ^ set(expected)):
        raise CorruptCheckpoint(f"{name} is {'not in the manifest' if name in there else 'missing'}")
    try:
        found = digests(folder, list(expected), chunk=CHUNKS[content["format"]])
    except OSError as error:
        name = os.path.relpath(str(error.filename or folder), folder)
        raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror}") from error
    for name in expected:
        if found[name] != expected[name]:
            raise CorruptCheckpoint(f"{name} was changed after it was written")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """What a manifest holds beside digests; the files are not looked at."""
    meta: dict[str, Any] = _read(folder)["meta"]
    return meta


def _read(folder: Path) -> dict[str, Any]:
    try:
        if (folder / MANIFEST).is_symlink():
            raise CorruptCheckpoint(f"{MANIFEST} is not one that maejax writes")
        raw = bounded.read(folder / MANIFEST)
    except OSError as error:
        raise CorruptCheckpoint(f"{MANIFEST}: {error.strerror}") from error
    body, _, seal = raw[:-1].rpartition(b"\n")
    if raw[-1:] != b"\n" or hashlib.sha256(body).hexdigest().encode() != seal:
        raise CorruptCheckpoint(f"{MANIFEST} was changed after it was written")
    content = json.loads(body)
    if content.get("format") not in CHUNKS:
        raise UsageError(
            f"{folder} has checkpoint format {content.get('format')}; this maejax reads up to {FORMAT}: go on "
            "with the version that wrote it, which the run's env.json names"
        )
    if missing := {"step", "meta", "files"} - content.keys():
        raise CorruptCheckpoint(f"{MANIFEST} has no {', '.join(sorted(missing))}")
    if folder.name.isdigit() and content["step"] != int(folder.name):
        raise CorruptCheckpoint(f"{MANIFEST} is that of step {content['step']}")
    return content


def sealed_steps(folder: Path) -> list[int]:
    """The steps that have a sealed checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit() and (f / MANIFEST).exists())


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below a folder; what is neither file nor folder, such as a link, makes it corrupt."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CorruptCheckpoint(f"{path.relative_to(folder)} is a link or another thing that is no file")
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in sorted(files))


def _sync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---- Digests --------------------------------------------------------------------------------------------------------


def digests(
    folder: Path, names: Sequence[str], *, chunk: int = CHUNKS[FORMAT], durable: bool = False
) -> dict[str, str]:
    """The digest of each file: its SHA-256, and of one above a chunk the SHA-256 of those of its chunks, in hex.

    Chunks are hashed in threads, so a single large file takes no longer than many small ones. With `durable` files
    are flushed to the disk, too.
    """
    places = [(name, start) for name in names for start in range(0, max((folder / name).stat().st_size, 1), chunk)]
    with ThreadPoolExecutor(THREADS, "hash") as pool:
        parts = list(pool.map(lambda place: _hash(folder / place[0], place[1], chunk, durable), places))
    found: dict[str, list[bytes]] = {name: [] for name in names}
    for (name, _), part in zip(places, parts, strict=True):
        found[name].append(part)
    return {name: (p[0] if len(p) == 1 else hashlib.sha256(b"".join(p)).digest()).hex() for name, p in found.items()}


def _hash(path: Path, start: int, length: int, durable: bool) -> bytes:
    buffer, total = memoryview(bytearray(1 << 20)), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if durable and start == 0:
            os.fsync(file.fileno())
        file.seek(start)
        left = length
        while left and (read := file.readinto(buffer[: min(left, len(buffer))])):
            total.update(buffer[:read])
            left -= read
    return total.digest()
