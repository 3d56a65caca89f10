"""Strict settings for all tests: eight virtual CPU devices, no implicit rank promotion, warnings are errors."""

import os
import signal
import tempfile
from pathlib import Path

import jax
import pytest

# Most of a cold run is compilation; without LLVM's optimisations it takes less than half. `make soak` keeps them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A shell that starts the tests in the background lets them ignore SIGINT, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same small networks many times over, in many processes: this one and those that it starts.
# The cache holds compiled code, so it is one user's own.
cache = Path(tempfile.gettempdir()) / f"maejax-test-cache-{os.getuid()}-{jax.__version__}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ.get("MAEJAX_TEST_CACHE", str(cache)))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images for development; they are no part of the project."""
    folder = Path(os.environ.get("MAEJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; MAEJAX_TEST_DATA may name it")
    return folder
