"""ViT-L/16 on ImageNet-1k: the paper's pretraining recipe (arXiv 2111.06377, Table 8), with normalised pixels as the target.

    maejax pretrain --config=configs/pretrain_vit_l16_imagenet.py --workdir=runs/l16 --config.data.dir=DIR_OF_TFDS

The data is TFDS's imagenet2012, prepared as ArrayRecord; any folder of images does too:
--config.data.source=/data/imagenet/train. Per training image: 124 GFLOP. The whole recipe is 1.3e20 FLOP: at 40 % of the peak of
8 H100s about 11 hours. Published with these settings: 84.9 % (raw pixels) to 85.9 % (1600 epochs) after fine-tuning.
Memory: about 90 MB an image and device, plus 5 GB of state. Use --config.grad_accum_steps=2 where it is short.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.data.source = "tfds:imagenet2012"
    c.data.eval_split = "validation"
    c.model.size, c.model.patch = "L", (16,)
    c.batch_size = 4096
    c.base_lr = 1.5e-4  # peak 2.4e-3
    c.total_epochs, c.warmup_epochs = 800.0, 40.0  # the paper's best results use 1600: --config.epochs=1600
    c.save_epochs, c.picture_epochs = 5.0, 20.0
    c.dtype = "bfloat16"
    return c
