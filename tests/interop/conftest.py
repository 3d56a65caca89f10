"""The real libraries, where they are installed: `make interop` makes an environment that has them.

timm imports torchvision, which has no CPU build everywhere; it uses nothing of it for a ViT. So timm is imported once,
here, with empty stand-ins, which are then taken away: transformers asks whether torchvision is there, and shall see the
truth.
"""

import enum
import importlib.machinery
import sys
import types
import warnings

import pytest

STAND_INS = (
    "torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
    "torchvision.transforms.functional", "torchvision.datasets",
)  # fmt: skip


class _Interpolation(enum.Enum):
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(6)


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # type: ignore[attr-defined]

    def get(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if (inner := f"{name}.{attribute}") in STAND_INS:
            return sys.modules[inner]
        return _Interpolation if attribute == "InterpolationMode" else type(attribute, (), {})

    module.__getattr__ = get  # type: ignore[method-assign]
    return module


def import_libraries() -> None:
    """Imports torch, transformers and timm; skips the test, or raises outside of one, without them."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed; `make interop` installs it")
    import torch
    import transformers
    from transformers import ViTMAEForPreTraining, ViTModel  # noqa: F401

    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        import torchvision  # noqa: F401

        hidden: tuple[str, ...] = ()
    except ImportError:
        sys.modules.update({name: _stand_in(name) for name in STAND_INS})
        hidden = STAND_INS
    pytest.importorskip("timm", reason="timm is not installed; `make interop` installs it")
    import timm.data
    import timm.layers  # noqa: F401

    for name in hidden:
        del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """The libraries, imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_libraries()
