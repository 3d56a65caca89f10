"""The README.md of a converted folder: what it is, how to load it, under which licence. Hugging Face reads its head."""

from typing import Any

LOADING = {
    "timm": """\
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)  # normalised float32 (b c h w) -> (b 1+n d): class token, patches""",
    "huggingface": """\
from transformers import ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained("FOLDER")  # masks at random; for features, convert with --encoder-only""",
    "encoder": """\
from transformers import ViTModel

model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)
tokens = model(images).last_hidden_state  # normalised float32 (b c h w) -> (b 1+n d): class token, patches""",
    "facebook": """\
from safetensors.torch import load_file

model.load_state_dict(load_file("FOLDER/model.safetensors"))  # of models_mae.py, or the encoder's of models_vit.py""",
    "safetensors": """\
import maejax

encoder, params = maejax.load_encoder("FOLDER")""",
    "big_vision": """\
import numpy as np

weights = np.load("FOLDER/model.npz")  # "params/Transformer/encoderblock_0/..."; big_vision's GELU is approximate""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(tokens,) = session.run(None, {"images": images})  # normalised float32 (b c h w) -> (b 1+n d)""",
}


def card(facts: dict[str, Any], origin: dict[str, Any], format: str, encoder_only: bool) -> str:
    """The text of a model card."""
    license, source = origin.get("license"), origin.get("source")
    head = [
        "---",
        *([f"license: {license}"] if license else []),
        "tags:",
        "- masked-autoencoder",
        "- vision-transformer",
    ]
    if format == "huggingface":
        head.append("library_name: transformers")
    if format == "timm":
        head.append("library_name: timm")
    h, w = facts["image"]
    p, q = facts["patch"]
    decoder = f", with its decoder ({facts['decoder_width']} wide, {facts['decoder_depth']} blocks)"
    has_decoder = format in ("huggingface", "facebook", "safetensors") and not encoder_only and facts["has_decoder"]
    target = "pixels normalised per patch" if facts["norm_pix"] else "plain pixels"
    lines = [
        *head,
        "---",
        "",
        "# Masked autoencoder",
        "",
        f"A Vision Transformer ({facts['width']} wide, {facts['depth']} blocks, {facts['heads']} heads) for images of "
        f"{h}x{w} with {facts['channels']} channels, in patches of {p}x{q}{decoder if has_decoder else ''}. "
        f"Pretrained by masked autoencoding (arXiv 2111.06377), regressing {target}; written by maejax.",
        "",
        f"Images are scaled to [0, 1], then normalised with mean {facts['mean']} and deviation {facts['std']}. "
        "LayerNorms have an eps of 1e-6.",
        "",
        "```python",
        LOADING["encoder" if format == "huggingface" and encoder_only else format],
        "```",
        "",
        f"Source: {source}." if source else "Source: a run of maejax.",
        f"Licence: {license}, as it came with the source." if license else "Licence: none was stated with the source.",
        "",
    ]
    return "\n".join(lines)
