"""What can go wrong for a user, and the exit code that each kind of it ends a run with.

Exit codes are an interface: launchers and supervisors decide by them whether to start the same command again.
"""

import difflib
import importlib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class MaejaxError(Exception):
    """An error for people: one line with the value, what is allowed and what to do. The CLI prints it alone."""

    exit_code = 1


class UsageError(MaejaxError):
    """The command or its config is wrong; nothing was started."""

    exit_code = 2


class TooManyBadImages(MaejaxError):
    """More records were unreadable than `data.max_bad_fraction` allows."""

    exit_code = 65


class NoValidCheckpoint(MaejaxError):
    """The run has checkpoints, and none of them verifies."""

    exit_code = 66


class Diverged(MaejaxError):
    """Loss or gradient were not finite, or far too large, again and again, whatever the data."""

    exit_code = 70


class WorkersDied(MaejaxError):
    """Processes that load images died again and again; to start the same command again would be no better."""

    exit_code = 71


class SilentCorruption(MaejaxError):
    """Devices that should hold the same numbers do not: one has computed, kept or sent something wrong."""

    exit_code = 72


class StorageFailed(MaejaxError):
    """Checkpoints can no longer be written."""

    exit_code = 74


class Preempted(MaejaxError):
    """A signal asked the run to stop; its state is saved, and the same command goes on from there."""

    exit_code = 75


class Stalled(MaejaxError):
    """No progress for longer than the phase may take; the stacks of all threads are written."""

    exit_code = 124


class PeerLost(MaejaxError):
    """Another process of the run died or failed."""

    exit_code = 134


def reason_of(error: BaseException) -> str:
    """Why something failed, as a part of a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {os.path.basename(str(error.filename))}" if error.filename else "")
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def look_up(table: Mapping[str, Value], name: str, key: str) -> Value:
    """`table[name]`, where `name` came from the config key `key`; raises UsageError with the names that there are."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"{key}={name!r} is not one of {', '.join(table)}{hint}")


def import_object(path: str, key: str) -> Any:
    """The object that the dotted name `package.module:Name` means, for code that lives outside this package."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{key}={path!r} cannot be imported: {error}") from error
