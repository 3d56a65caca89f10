"""The paper's linear probe of a ViT-B/16 on ImageNet-1k, as training (Table 10; Appendix A.1).

    maejax finetune --config=configs/probe_vit_b16_imagenet.py --from=runs/b16 --config.data.dir=DIR

A linear layer behind a batch norm without affine parameters, on the frozen class token; LARS, batch 16384, 90 epochs
(50 are enough for L and H). `maejax evaluate runs/b16 --with=linear` answers nearly the same question in minutes.
The paper reports 68.0 % for B, 75.8 % for L, 76.6 % for H; not run here.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.objective = "classify"
    c.data.source, c.data.eval_split = "tfds:imagenet2012", "validation"
    c.model.size, c.model.patch = "B", (16,)
    c.finetune.blocks, c.finetune.pool, c.finetune.batch_norm, c.finetune.head_std = 0, "cls", True, 0.01
    c.batch_size = 16384
    c.optimizer.name, c.optimizer.weight_decay = "lars", 0.0
    c.base_lr = 0.1  # peak 6.4
    c.total_epochs, c.warmup_epochs = 90.0, 10.0
    c.data.crop_scale, c.data.eval_crop = (0.08, 1.0), 0.875
    c.evals, c.eval_epochs, c.eval_images = "accuracy", 1.0, 1_000_000
    c.save_epochs = 1.0
    c.dtype = "bfloat16"
    return c
