"""ViT-Ti with patches of 4 x 4 on CIFAR-10 at its own 32 px: a study that fits a small machine.

    maejax pretrain --config=configs/pretrain_vit_ti4_cifar10.py --workdir=runs/cifar10 --config.data.dir=DIR_OF_TFDS

The data is TFDS's, prepared as ArrayRecord. An image and step cost 1.3 GFLOP, so two CPU cores would need days for the
400 epochs; `--config.steps=400 --config.batch_size=128 --config.warmup_steps=40 --config.base_lr=2e-3` takes minutes.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.data.source = "tfds:cifar10"
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    c.image_size, c.model.patch = (32,), (4,)
    c.model.size = "Ti"
    c.decoder.width, c.decoder.depth, c.decoder.heads = 192, 4, 3
    c.batch_size = 512
    c.base_lr = 5e-4
    c.total_epochs, c.warmup_epochs = 400.0, 20.0
    c.save_epochs, c.picture_epochs = 10.0, 20.0
    c.evals = "knn,linear"
    return c
