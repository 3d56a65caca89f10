"""Writes tests/data/convert.npz: what transformers and timm compute with the weights of `tests/goldens.py`.

    python tests/interop/make_goldens.py

Needs the [interop] extra. Answers are sampled, so the file stays small.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import goldens  # noqa: E402
import numpy as np  # noqa: E402


def transformers_answers(size: str, norm_pix: bool) -> dict[str, np.ndarray]:
    """Loss, predictions of the masked patches, features."""
    import torch
    from networks import ask_vit_mae
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(**goldens.hub_config(size, norm_pix))).eval()
    tensors = {}  # the library's own modules have newer names, which its loading translates; here that is done by hand
    for name, tensor in goldens.hub(size).items():
        for old, new in (
            ("vit.encoder.layer.", "vit.layers."), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
        ):  # fmt: skip
            name = name.replace(old, new)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(tensor))
    model.load_state_dict(tensors)
    noise = goldens.noise(size)
    found = ask_vit_mae(model, goldens.images(goldens.SIZES[size][4]), noise)
    masked = np.argsort(noise, axis=1)[:, int(noise.shape[1] * 0.25) :]
    found["predictions"] = np.take_along_axis(found["predictions"], masked[:, :, None], axis=1)
    return found


def timm_answers(size: str) -> dict[str, np.ndarray]:
    """Features."""
    import timm
    import torch

    model = timm.create_model({"B": "vit_base_patch16_224", "H": "vit_huge_patch14_224"}[size], num_classes=0).eval()
    tensors = goldens.official(size, decoder=False)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        pixels = torch.from_numpy(goldens.normalized(goldens.images(224)))
        return {"features": model.forward_features(pixels).numpy()}


def answers() -> dict[str, np.ndarray]:
    """All of them, sampled, as "library/size/what"."""
    found = {}
    for size in ("tiny", "B", "H2"):
        for norm_pix in (True, False):
            for name, array in transformers_answers(size, norm_pix).items():
                found[f"transformers/{size}/{'norm' if norm_pix else 'plain'}/{name}"] = goldens.sample(array)
    for size in ("B", "H"):
        for name, array in timm_answers(size).items():
            found[f"timm/{size}/{name}"] = goldens.sample(array)
    return found


if __name__ == "__main__":
    from conftest import import_libraries

    import_libraries()
    np.savez_compressed(goldens.FILE, **answers())
    print(f"wrote {goldens.FILE}: {goldens.FILE.stat().st_size:,} bytes")
