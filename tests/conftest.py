"""Strict settings for all tests: eight virtual CPU devices, no implicit rank promotion, warnings are errors."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images for development; they are no part of the project."""
    folder = Path(os.environ.get("MAEJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; MAEJAX_TEST_DATA may name it")
    return folder
