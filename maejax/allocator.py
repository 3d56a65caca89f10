"""Host memory on machines without an accelerator, where XLA asks the C library for hundreds of megabytes every step.

glibc hands such blocks back to the system when they are freed and gets them zeroed page by page the next time: a
quarter of a step's CPU time where it was measured (docs/results.md). Told to keep them, it does not.
"""

import ctypes
import glob
import os
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Tells glibc so, if this process will compute on the CPU. Returns whether it did.

    One arena, because only the first can grow beyond 64 MB; and so before JAX is imported and its threads have theirs.
    """
    if "jax" in sys.modules:
        return False
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(glob.glob(pattern) for pattern in ACCELERATORS)
    if not cpu or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
