"""Fine-tuning on CIFAR-10 at its own 32 px, from a run of `pretrain_vit_ti4_cifar10` or from scratch.

    maejax finetune --config=configs/finetune_vit_ti4_cifar10.py --from=runs/cifar10 --config.data.dir=DIR_OF_TFDS

--config.finetune.blocks=4 trains the last four blocks only. `benchmarks/cifar10_study.py` uses it; docs/results.md has
what came out.
"""

from ml_collections import ConfigDict

from maejax import config


def get_config() -> ConfigDict:
    """All keys of the run."""
    c = config.default()
    c.objective = "classify"
    c.data.source = "tfds:cifar10"
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    c.data.crop_scale = (0.5, 1.0)
    c.image_size, c.model.patch = (32,), (4,)
    c.model.size, c.model.positions, c.model.drop_path = "Ti", "learned", 0.0
    c.batch_size = 128
    c.base_lr, c.min_lr = 2e-3, 1e-6
    c.total_epochs, c.warmup_epochs = 50.0, 5.0
    c.optimizer.b2, c.optimizer.layer_decay = 0.999, 0.75
    c.finetune.smoothing, c.finetune.head_std = 0.1, 0.02
    c.evals, c.eval_epochs = "accuracy", 5.0
    c.save_epochs = 5.0
    return c
