"""Freed memory is kept on the CPU, and only there; in processes of their own, because it cannot be undone."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
{before}
from maejax.allocator import keep_freed_memory
kept = keep_freed_memory()
np.ones(25_000_000)  # 200 MB: the first time, every page is new
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(25_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def run(before="", platform="cpu"):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    command = [sys.executable, "-c", CODE.format(before=before)]
    kept, faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_blocks_are_used_again():
    kept, faults = run()
    assert kept and faults < 1000  # 200 MB are 50,000 pages


def test_too_late_once_jax_is_there():
    assert run(before="import jax")[0] is False
