"""`maejax data pack`: a source of images as ArrayRecord files of smaller ones, which are read and decoded faster.

    DST/  pack.json  bad_images.jsonl  shard-00000.array_record  shard-00001.array_record  ...

Shard s holds records s * 1024 to s * 1024 + 1023 of the source, in order, without those that cannot be read. It is
written beside its place, synced and renamed, and then a file with its count and digest: a shard is complete or absent,
and the same command again writes what is absent, to the same bytes. `pack.json` comes last, and makes it a source.
"""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from maejax.data.decode import BadImage, decode, make_example
from maejax.data.packed import PACK, SETTINGS
from maejax.data.sources import Source
from maejax.data.transforms import read_record, shrink
from maejax.errors import MaejaxError, StorageFailed, UsageError
from maejax.faults import fault_point

SHARD = 1024  # records of the source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Attributes:
    source: what is packed.
    folder: DST.
    size: of the shorter side, in pixels, at most; images no larger stay as they are, byte for byte.
    quality: of the JPEGs that the others become, with colors at half the size.
    channels: 1 or 3.
    """

    source: Source
    folder: Path
    size: int
    quality: int
    channels: int
    max_pixels: int

    def settings(self) -> dict[str, Any]:
        """What shards depend on: the folder may only be gone on with by the same."""
        kept = ("size", "quality", "channels", "max_pixels")
        return {"source": self.source.fingerprint()} | {name: getattr(self, name) for name in kept}

    def shards(self) -> int:
        """How many there will be."""
        return -(-len(self.source) // SHARD)


def pack(p: Packing, *, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what is absent, with so many processes; returns what `pack.json` holds.

    Raises:
      UsageError: the folder holds something else, or no image of the source can be read.
      StorageFailed: a shard could not be written.
    """
    _check_folder(p)
    if (p.folder / PACK).exists():
        say("complete already")
        return json.loads((p.folder / PACK).read_text())
    missing = [number for number in range(p.shards()) if _read_summary(p, number) is None]
    if len(missing) < p.shards():
        say(f"{p.shards() - len(missing)} of {p.shards()} shards are there")
    start, done = time.monotonic(), 0
    for left, summary in enumerate(_summaries(p, missing, min(workers, len(missing))), start=1 - len(missing)):
        done += summary["images"]
        rate = done / (time.monotonic() - start)
        bad = f", {len(summary['bad'])} bad" if summary["bad"] else ""
        say(f"shard {summary['number']}: {summary['images']} images{bad}; {-left} to go, {rate:,.0f} img/s")
    return _finish(p)


def _check_folder(p: Packing) -> None:
    """Makes a folder ready to pack into; raises UsageError if something else is there."""
    for name in (PACK, SETTINGS):
        if (p.folder / name).exists():
            before = json.loads((p.folder / name).read_text())["settings"]
            for key, value in p.settings().items():
                if before[key] != value:
                    raise UsageError(f"{p.folder} was packed with {key}={before[key]}, not {value}; choose another DST")
            return
    if any(not path.name.startswith(".") for path in p.folder.iterdir()):
        raise UsageError(f"{p.folder} is not empty and holds no pack; choose another DST")
    _write(p.folder / SETTINGS, json.dumps({"settings": p.settings()}))


# ---- Shards ---------------------------------------------------------------------------------------------------------


def _summaries(p: Packing, missing: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Writes the missing shards, each by one process; yields what `_summary_file` holds as they are done."""
    if workers <= 1:
        yield from (write_shard(p, number) for number in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_leave_with_parent, initargs=(os.getpid(),)) as pool:
        jobs = [pool.submit(write_shard, p, number) for number in missing]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise MaejaxError(f"a worker of the pack into {p.folder} died; the same command again goes on") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent(parent: int) -> None:
    """Ends this worker soon after its parent, which may be killed and tell it nothing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shard(p: Packing, number: int) -> dict[str, Any]:
    """Writes a shard, then the file that says so; returns what that holds."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path, bad, images = _shard_file(p, number), [], 0
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = ArrayRecordWriter(str(draft), "group_size:1,uncompressed")  # each is read alone; JPEGs stay that long
        for index in range(number * SHARD, min((number + 1) * SHARD, len(p.source))):
            fault_point("pack_record")
            try:
                writer.write(_packed(p, index))
                images += 1
            except BadImage as error:
                bad.append({"record": index, "name": p.source.name(index), "cause": error.cause})
        writer.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        summary = {"number": number, "images": images, "bytes": draft.stat().st_size, "sha256": digest, "bad": bad}
        if images:
            draft.rename(path)
        else:  # an ArrayRecord file holds at least one
            draft.unlink()
        fault_point("pack_shard")
        _write(_summary_file(p, number), json.dumps(summary))
    except (OSError, RuntimeError) as error:
        raise StorageFailed(f"shard {number} of {p.folder} could not be written: {error}") from error
    return summary


def _packed(p: Packing, index: int) -> bytes:
    """The record to write: an encoded image, in a tf.train.Example with its label if there is one."""
    record = read_record(p.source, index)
    pixels = decode(record["image"], channels=p.channels, max_pixels=p.max_pixels)
    small = shrink(pixels, p.size)
    if small is pixels and isinstance(record["image"], bytes):
        image = record["image"]
    elif small is pixels:
        image = _as_png(pixels)
    else:
        image = _as_jpeg(small, p.quality)
    if p.source.num_classes is None:
        return image
    return make_example(image, record["label"])


def _as_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    grey = pixels.shape[2] == 1
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, "GRAY" if grey else "RGB", "Gray" if grey else "420"
    )


def _as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _shard_file(p: Packing, number: int) -> Path:
    return p.folder / f"shard-{number:05}.array_record"


def _summary_file(p: Packing, number: int) -> Path:
    return p.folder / f".shard-{number:05}.json"


def _read_summary(p: Packing, number: int) -> dict[str, Any] | None:
    """What says that a shard is complete; None if it is not."""
    try:
        summary = json.loads(_summary_file(p, number).read_text())
        if summary["images"] and _shard_file(p, number).stat().st_size != summary["bytes"]:
            return None
        return summary
    except (OSError, ValueError, KeyError):
        return None


# ---- The end --------------------------------------------------------------------------------------------------------


def _finish(p: Packing) -> dict[str, Any]:
    """Lists bad images, writes `pack.json`, and deletes what was needed on the way."""
    summaries = [_read_summary(p, number) for number in range(p.shards())]
    found = [summary for summary in summaries if summary is not None]
    if len(found) < p.shards():
        raise StorageFailed(f"shards of {p.folder} are gone; run the same command again")
    images, bad = sum(summary["images"] for summary in found), [entry for summary in found for entry in summary["bad"]]
    causes = dict(Counter(entry["cause"] for entry in bad).most_common())
    if not images:
        raise UsageError(f"none of the {len(p.source)} images can be read ({causes}); the first is {bad[0]['name']}")
    if bad:
        _write(p.folder / "bad_images.jsonl", "".join(json.dumps(entry) + "\n" for entry in bad))
    manifest = {
        "settings": p.settings(),
        "images": images,
        "num_classes": p.source.num_classes,
        "classes": list(getattr(p.source, "classes", ())),
        "bad_images": causes,
        "bytes": sum(summary["bytes"] for summary in found if summary["images"]),
        "content": hashlib.sha256("".join(summary["sha256"] for summary in found).encode()).hexdigest()[:16],
        "shards": [
            {"file": _shard_file(p, summary["number"]).name, "images": summary["images"], "sha256": summary["sha256"]}
            for summary in found
            if summary["images"]
        ],
    }
    _write(p.folder / PACK, json.dumps(manifest, indent=1) + "\n")
    for path in (p.folder / SETTINGS, *p.folder.glob(".shard-*")):
        path.unlink(missing_ok=True)
    return manifest


def _write(path: Path, text: str) -> None:
    """The file has all of the text or does not exist, whatever happens."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
