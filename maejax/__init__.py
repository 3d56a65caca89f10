"""maejax: masked-autoencoder pretraining in JAX/Flax (arXiv 2111.06377)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maejax.encoder import load_encoder as load_encoder

__version__ = "0.1.0"
__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    # Lazy, so that data workers and `maejax --help` do not pay for importing JAX.
    if name == "load_encoder":
        from maejax.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'maejax' has no attribute {name!r}")
