"""A folder that `maejax data pack` has filled, seen from outside."""

import glob
import json
from pathlib import Path
from typing import Any

from maejax.errors import UsageError

PACK = "pack.json"  # written last
SETTINGS = "packing.json"  # there until then
SHARDS = "shard-*.array_record"


def pattern_of_pack(spec: str) -> str | None:
    """Of the pack's shards, if `spec` is the folder of one."""
    folder = Path(spec).expanduser()
    if not any((folder / name).is_file() for name in (PACK, SETTINGS)):
        return None
    return f"{glob.escape(str(folder))}/{SHARDS}"


def read_manifest(shard: str) -> dict[str, Any] | None:
    """What the pack that a shard belongs to says of itself; None if there is no pack; UsageError if it is half done."""
    folder = Path(shard).parent
    if (folder / PACK).is_file():
        return json.loads((folder / PACK).read_text())
    if (folder / SETTINGS).is_file():
        raise UsageError(f"{folder} is half packed; run the same maejax data pack again, it goes on where it stopped")
    return None
