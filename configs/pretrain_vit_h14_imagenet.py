"""ViT-H/14 on ImageNet-1k with the paper's pretraining recipe (arXiv 2111.06377, Table 8), target normalised pixels.

    maejax pretrain --config=configs/pretrain_vit_h14_imagenet.py --workdir=runs/h14 --config.data.dir=DIR_OF_TFDS

The data is TFDS's imagenet2012, prepared as ArrayRecord; a folder of images does too: --config.data.source=FOLDER. An
image and step cost 290 GFLOP, the whole recipe 3.0e20: by arithmetic, not measured, 26 hours on eight H100 at 40 % of
their peak. Memory, estimated and without remat: about 160 MB an image, and 11 GB of state; where that is too much,
--config.grad_accum_steps=2 or --config.model.remat=dots. The paper reports 86.9 % after fine-tuning, 76.6 % by linear
probing, with 1600 epochs.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.data.source = "tfds:imagenet2012"
    c.data.eval_split = "validation"
    c.model.size, c.model.patch = "H", (14,)
    c.batch_size = 4096
    c.base_lr = 1.5e-4  # peak 2.4e-3
    c.total_epochs, c.warmup_epochs = 800.0, 40.0  # --config.epochs=1600 for the paper's best results
    c.save_epochs, c.picture_epochs = 5.0, 20.0
    c.dtype = "bfloat16"
    return c
