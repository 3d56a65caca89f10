"""Whether files hold what they held: for the fingerprints of sources, which must be cheap where data are large."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLED = 32 << 20  # bytes that are read at most
FILES = 256  # that are opened at most, where there is more


def digest_of(*parts: Any) -> str:
    """16 hex digits of some values."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:16]


def size_of(path: Path) -> int:
    """In bytes; -1 for what is listed and not there, such as a link to nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def sample_of(paths: Sequence[Path]) -> str:
    """SHA-256 of what files hold, if it is no more than SAMPLED; else of the first bytes of FILES of them.

    What cannot be read counts as empty.
    """
    all_of_it = sum(max(size_of(path), 0) for path in paths) <= SAMPLED
    chosen = paths if all_of_it else paths[:: -(-len(paths) // FILES)]
    total = hashlib.sha256()
    for path in chosen:
        content = b""
        with contextlib.suppress(OSError):
            if path.is_file():  # a pipe would be waited for
                with path.open("rb") as file:
                    content = file.read(SAMPLED if all_of_it else SAMPLED // len(chosen))
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()
