"""JAX's coordination service, which shall not have the last word when a process dies.

Its clients end their process with pages of text as soon as process 0 has gone, before `peers.Line` can say who died and
why. What they do instead is a parameter that `jax.distributed` does not pass on; and jaxlib cannot convert what it
calls that function with (seen with 0.10), so that C++ would end the process there. Where this way is blocked, the pages
come, and the exit code is the same.
"""

import ctypes
import functools
import os
import time
from collections.abc import Callable
from typing import Any

NEVER = 10**6  # seconds without a heartbeat after which JAX ends all processes: the line has seen to it long before
LAST_SECONDS = 5.0  # that the lookout gets to end the process with the cause

_kept: list[Any] = []  # what C++ calls must stay alive


def leave_deaths_to_the_line() -> None:
    """To be called before `jax.distributed.initialize`."""
    if _kept:
        return
    try:
        from jax._src.lib import _jax  # type: ignore[attr-defined]

        make: Callable[..., Any] = _jax.get_distributed_runtime_client
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (ImportError, AttributeError, OSError):
        return
    handler = ctypes.CFUNCTYPE(None)
    set_terminate.argtypes, set_terminate.restype = [handler], ctypes.c_void_p
    _kept.append(handler(_terminate))
    set_terminate(_kept[0])
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda *status: None)


def _terminate() -> None:
    # An exception of C++ that nobody catches. The lookout's thread goes on while this one sleeps.
    time.sleep(LAST_SECONDS)
    os.write(2, b"maejax: an exception in C++ ended this process\n")
    os.abort()
