"""Quickstart: a small masked autoencoder on the 1,797 scanned digits inside scikit-learn.

    maejax pretrain --config=configs/pretrain_digits.py --workdir=runs/digits
"""

from maejax import config


def get_config():
    c = config.default()
    c.data.source = "digits"
    c.data.channels = 1
    c.data.mean, c.data.std = (0.305,), (0.376,)
    c.data.flip = False  # a mirrored digit is another sign
    c.data.crop_scale = (0.6, 1.0)
    c.image_size, c.model.patch = (32,), (4,)
    c.model.size, c.model.width, c.model.depth, c.model.heads = "Ti", 128, 4, 4
    c.decoder.width, c.decoder.depth, c.decoder.heads = 64, 1, 4
    c.batch_size = 128
    c.base_lr = 2e-3
    c.total_epochs, c.warmup_epochs = 60.0, 5.0
    c.final_probe = True
    return c
