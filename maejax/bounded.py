"""Small files that come from others: configs, manifests, model cards. A pipe, a device or a gigabyte is not read."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MOST = 2**23  # bytes; the manifest of a ViT-H checkpoint has some thousands


def read(path: Path) -> bytes:
    """The file's bytes; OSError for one that cannot be read, is no regular file, or is larger than MOST."""
    number = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # a pipe that nobody writes to is no reason to wait
    with open(number, "rb") as file:
        there = os.fstat(number)
        if not stat.S_ISREG(there.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if there.st_size > MOST:
            raise OSError(errno.EFBIG, f"it has {there.st_size:,} bytes, more than {MOST:,}", str(path))
        return file.read()


def read_json(path: Path) -> Any:
    """The content of a JSON file; OSError as `read`, ValueError for what is no JSON."""
    try:
        return json.loads(read(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
