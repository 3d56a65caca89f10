"""Networks with seeded weights in torch, and the same questions asked of both sides."""

import numpy as np
import torch
from goldens import SIZES, normalized
from transformers import ViTMAEConfig, ViTMAEForPreTraining


def vit_mae(size: str, *, norm_pix: bool, depth: int | None = None, seed: int = 0) -> ViTMAEForPreTraining:
    """A ViTMAEForPreTraining with eps 1e-6, random weights everywhere, biases and norms included."""
    width, layers, heads, patch, image, (d_width, d_depth, d_heads) = SIZES[size]
    config = ViTMAEConfig(
        hidden_size=width, num_hidden_layers=depth or layers, num_attention_heads=heads, intermediate_size=4 * width,
        patch_size=patch, image_size=image, decoder_hidden_size=d_width, decoder_num_hidden_layers=d_depth,
        decoder_num_attention_heads=d_heads, decoder_intermediate_size=4 * d_width, layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    # The library's own tables, which transformers 5.24 leaves at zero in a model that is not loaded from a file.
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    randomize(model, seed)
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    return model


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter but the fixed tables: matrices as they should be in size, vectors away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                scale = name.endswith("weight")
                parameter.copy_(0.1 * draw + float(scale))
            else:
                parameter.copy_(draw * (parameter[0].numel() ** -0.5 if parameter.shape[0] > 1 else 0.5))


def ask_vit_mae(model: ViTMAEForPreTraining, batch: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Loss, predictions (b n p*q*c) and the features of the whole image, of the library."""
    pixels, ratio = torch.from_numpy(normalized(batch)), model.config.mask_ratio
    with torch.no_grad():
        out = model(pixels, noise=torch.from_numpy(noise))
        model.vit.config.mask_ratio = 0.0
        order = np.tile(np.arange(noise.shape[1], dtype=np.float32), (len(noise), 1))
        features = model.vit(pixels, noise=torch.from_numpy(order)).last_hidden_state
        model.vit.config.mask_ratio = ratio
    return {"loss": out.loss.numpy(), "predictions": out.logits.numpy(), "features": features.numpy()}
