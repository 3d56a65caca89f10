"""ViT-H/14 on ImageNet-1k: the paper's pretraining recipe (arXiv 2111.06377, Table 8), with normalised pixels as the target.

    maejax pretrain --config=configs/pretrain_vit_h14_imagenet.py --workdir=runs/h14 --config.data.dir=DIR_OF_TFDS

The data is TFDS's imagenet2012, prepared as ArrayRecord; any folder of images does too:
--config.data.source=/data/imagenet/train. Per training image: 290 GFLOP. The whole recipe is 3.0e20 FLOP: at 40 % of the peak of
8 H100s about 26 hours. Published with these settings: 86.9 % after fine-tuning (1600 epochs).
Memory: about 160 MB an image and device, plus 10 GB of state; --config.model.remat=dots or grad_accum_steps help.
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
    c.total_epochs, c.warmup_epochs = 800.0, 40.0  # the paper's best results use 1600: --config.epochs=1600
    c.save_epochs, c.picture_epochs = 5.0, 20.0
    c.dtype = "bfloat16"
    return c
