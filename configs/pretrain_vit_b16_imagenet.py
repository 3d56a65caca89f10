"""ViT-B/16 on ImageNet-1k: the paper's pretraining recipe (arXiv 2111.06377, Table 8), with normalised pixels as the target.

    maejax pretrain --config=configs/pretrain_vit_b16_imagenet.py --workdir=runs/b16 --config.data.dir=DIR_OF_TFDS

The data is TFDS's imagenet2012, prepared as ArrayRecord; any folder of images does too:
--config.data.source=/data/imagenet/train. Per training image: 58 GFLOP. The whole recipe is 5.9e19 FLOP: at 40 % of the peak of
8 H100s about 5 hours. Published with these settings: 83.6 % after fine-tuning, 68.0 % by linear probing (1600 epochs).
Memory at 4096 images: about 60 MB an image and device, plus 2 GB of state.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.data.source = "tfds:imagenet2012"
    c.data.eval_split = "validation"
    c.model.size, c.model.patch = "B", (16,)
    c.batch_size = 4096
    c.base_lr = 1.5e-4  # peak 2.4e-3
    c.total_epochs, c.warmup_epochs = 800.0, 40.0  # the paper's best results use 1600: --config.epochs=1600
    c.save_epochs, c.picture_epochs = 5.0, 20.0
    c.dtype = "bfloat16"
    return c
