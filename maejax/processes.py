"""What the processes of a run tell each other: who may write, what all must agree on, sums after every step.

Everything here is called by all processes alike, at the same point; with one process it does nothing of note.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maejax import watchdog
from maejax.errors import MaejaxError, StorageFailed, UsageError
from maejax.faults import fault_point

T = TypeVar("T")


def is_primary() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def fetch(x: Any) -> np.ndarray:
    """A global array as a whole, on every process."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        with watchdog.waiting():
            x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def share(value: Any) -> Any:
    """Process 0's value, JSON, on every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    fault_point("barrier")
    with watchdog.waiting():
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        padded = np.zeros(length, np.uint8)
        padded[: min(len(text), length)] = text[:length]
        return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def on_primary(action: Callable[[], T]) -> T | None:
    """Runs `action` on process 0; an error that it raises for people is raised on all. Its result, on process 0.

    What a disk refuses is such an error, too: StorageFailed.
    """
    result, error = None, None
    if is_primary():
        try:
            result = action()
        except MaejaxError as raised:
            error = raised
        except OSError as raised:
            error = StorageFailed(f"{raised.filename}: {raised.strerror}; check the disk, then run the command again")
    problem = share(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    if problem is not None:
        kinds = {kind.__name__: kind for kind in MaejaxError.__subclasses__()}
        raise kinds.get(problem[0], MaejaxError)(problem[1])
    return result


def check_same(values: dict[str, Any]) -> None:
    """Raises UsageError on every process if one has other values (JSON) than process 0, with the first differences."""
    if jax.process_count() == 1:
        return
    expected = share(values)
    mine = json.loads(json.dumps(values))
    different = [key for key in sorted(expected | mine) if expected.get(key) != mine.get(key)]
    said = [
        f"{key} is {expected.get(key)} on process 0, {mine.get(key)} on process {jax.process_index()}"
        for key in different
    ]
    text = np.zeros(400, np.uint8)
    line = np.frombuffer("; ".join(said).encode()[:400], np.uint8)
    text[: len(line)] = line
    everyone = np.asarray(multihost_utils.process_allgather(text)).reshape(-1, 400)
    problems = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everyone if row.any()]
    if problems:
        others = f" ({len(problems)} processes differ)" if len(problems) > 1 else ""
        raise UsageError(f"processes were started differently: {problems[0]}{others}")


def all_true(flag: bool) -> bool:
    """Whether `flag` is true on every process."""
    if jax.process_count() == 1:
        return flag
    fault_point("barrier")
    with watchdog.waiting():
        return bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).all())


def any_true(flag: bool) -> bool:
    """Whether `flag` is true on some process."""
    return not all_true(not flag)


class Sums:
    """Numbers summed over processes without waiting: `add` starts a sum, and `take` has it when the next one starts.

    All devices take part in a tiny program of its own, so hosts never talk to each other beside JAX's collectives.
    """

    def __init__(self, size: int):
        self._pending: jax.Array | np.ndarray | None = None
        if jax.process_count() == 1:
            return
        mesh = Mesh(np.array(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec("devices"))
        self._local = np.zeros((jax.local_device_count(), size), np.int32)
        self._sum = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def add(self, values: np.ndarray) -> None:
        """Starts to sum `values`, int32 (size)."""
        if jax.process_count() == 1:
            self._pending = values
            return
        self._local = self._local.copy()  # the last one may still be on its way
        self._local[0] = values
        self._pending = self._sum(jax.make_array_from_process_local_data(self._rows, self._local))

    def take(self) -> np.ndarray | None:
        """The sum that was started last, waited for; None if it was taken already."""
        pending, self._pending = self._pending, None
        if not isinstance(pending, jax.Array):
            return pending
        with watchdog.waiting():
            return np.asarray(pending)
