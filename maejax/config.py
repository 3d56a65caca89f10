"""Every key of a run, with its default and its meaning; `check` refuses what cannot be.

A recipe in `configs/` is a Python function `get_config()` that takes `default()` and sets what it needs; on the command
line `--config.a.b=value` overrides one key. Keys cannot be invented: an unknown one is refused with its nearest name.

A duration is written `NAME_steps`, `NAME_epochs` or `NAME_examples`, at most one of the three; see `DURATIONS`.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from maejax.errors import UsageError

# What a duration is when none of its three keys is set. None: the run cannot do without it.
DURATIONS: dict[str, str | None] = {
    "total": None,  # length of the run
    "warmup": "0 steps",  # linear warm-up of the learning rate, part of the total
    "log": "20 steps",  # one line of metrics
    "save": "500 steps",  # one checkpoint; the last step is always saved
    "eval": "0 steps",  # one run of `evals`; 0: only after the last step
    "picture": "1000 steps",  # one grid of reconstructions; the last step always makes one
}

# Keys that say how a run is executed, not what it computes: a resumed run may change them (elastic resume).
EXECUTION_KEYS = (
    "mesh", "sharding", "model.scan", "model.remat", "data.source", "data.dir", "data.workers", "data.prefetch",
    "data.record_seconds",
    "log_steps", "log_epochs", "log_examples", "save_steps", "save_epochs", "save_examples", "keep_checkpoints",
    "profile_steps", "picture_steps", "picture_epochs", "picture_examples", "tensorboard", "wandb", "evals",
    "eval_images", "guard.max_rollbacks", "guard.compare_steps", "eval_steps", "eval_epochs", "eval_examples",
)  # fmt: skip


def default() -> ConfigDict:
    """A complete config. Recipes start from it; nothing else adds keys."""
    c = ConfigDict()
    c.seed = 0  # decides initial weights, order of records, crops, flips and masks
    c.objective = "mae"  # a name in maejax.objectives.OBJECTIVES, or "package.module:Class"
    c.batch_size = 256  # global: processes x devices x per device x accumulation
    c.grad_accum_steps = 1  # microbatches that one step computes in turn
    c.image_size = (224,)  # (side,) or (height, width), in pixels; multiples of the patch
    c.dtype = "float32"  # of activations and matrix products: float32 | bfloat16; parameters stay float32

    for name in DURATIONS:
        c[f"{name}_steps"] = placeholder(int)
        c[f"{name}_epochs"] = placeholder(float)  # passes over data.split
        c[f"{name}_examples"] = placeholder(int)

    c.base_lr = 1.5e-4  # per 256 images: the peak is base_lr * batch_size / 256 (paper, Table 8)
    c.min_lr = 0.0  # where the half-cosine ends
    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | lars
    c.optimizer.b1 = 0.9  # the momentum of LARS, too
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.05  # of matrices (and, in pretraining, tokens); never of biases and LayerNorms
    c.optimizer.layer_decay = 1.0  # each layer's learning rate over the next one's, head 1; for fine-tuning
    c.optimizer.clip_norm = placeholder(float)  # largest global gradient norm; unset: no clipping, as the paper
    c.optimizer.ema_decay = placeholder(float)  # of an exponential moving average of the weights; unset: none kept

    c.model = ConfigDict()  # the encoder
    c.model.size = "B"  # a name in maejax.models.SIZES: width, depth and heads
    c.model.patch = (16,)  # (side,) or (height, width), in pixels
    c.model.width = placeholder(int)  # instead of the size's
    c.model.depth = placeholder(int)  # instead of the size's
    c.model.heads = placeholder(int)  # instead of the size's
    c.model.mlp_ratio = 4.0  # hidden units over width; 4 is the named size's own, which for g is 48/11
    c.model.cls_token = True
    c.model.positions = "fixed"  # fixed (sine-cosine) | learned, starting as that
    c.model.drop_path = 0.0  # chance that an image skips a branch of the last block, less below; for fine-tuning
    c.model.mask_tokens = False  # encode mask tokens too: the slow baseline of the paper's Table 1c
    c.model.scan = True  # one compiled block in a loop; False: the blocks one after the other
    c.model.remat = "none"  # a name in maejax.models.layers.REMAT: what the backward pass computes again
    c.decoder = ConfigDict()
    c.decoder.kind = "self"  # self | cross: queries attend to the encoder's tokens alone, as CrossMAE (docs/options.md)
    c.decoder.subset = 1.0  # share of the masked patches that is decoded, drawn anew for every image, in (0, 1]
    c.decoder.depth = 8
    c.decoder.width = 512
    c.decoder.heads = 16

    c.mask = ConfigDict()
    c.mask.ratio = 0.75  # share of the patches that is hidden, in (0, 1)
    c.mask.sampler = "random"  # a name in maejax.data.masking.SAMPLERS
    c.norm_pix = True  # regress pixels normalised per patch (Table 1d, "pixel w/ norm")

    c.finetune = ConfigDict()  # for objective="classify"
    c.finetune.num_classes = placeholder(int)  # unset: the source's
    c.finetune.blocks = placeholder(int)  # last blocks that are trained; 0: the head alone; unset: everything
    c.finetune.pool = "mean"  # mean (of patch tokens) | cls
    c.finetune.batch_norm = False  # of features before the head, as in the paper's linear probe
    c.finetune.head_std = 2e-5  # of the head's initial weights
    c.finetune.smoothing = 0.0  # of labels
    c.finetune.mixup = 0.0  # a of Beta(a, a); 0: none
    c.finetune.cutmix = 0.0  # the same; both on: one or the other for each batch

    c.data = ConfigDict()
    c.data.source = "digits"  # digits | FOLDER | folder:PATH | tfds:NAME | arrayrecord:GLOB | package.module:Class
    c.data.split = "train"  # of sources that have splits
    c.data.eval_split = "test"  # on which evaluations are scored
    c.data.dir = placeholder(str)  # where TFDS data lives; unset: TFDS_DATA_DIR, else TFDS's own default
    c.data.channels = 3  # 1 grey, 3 RGB, 4 RGBA; any other number needs arrays with that many
    c.data.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1], per channel or one for all
    c.data.std = (0.229, 0.224, 0.225)
    c.data.sides = ()  # sides of images in equal parts of the run, growing to image_size: 128,160,192,224; (): that
    c.data.crop = "random_resized"  # a name in maejax.data.transforms.CROPS
    c.data.crop_scale = (0.2, 1.0)  # share of the image's area
    c.data.crop_ratio = (3 / 4, 4 / 3)  # width / height
    c.data.flip = True  # left-right, every second image
    c.data.resize = "exact"  # exact | fast: decodes what the random crop needs, pixels differ (docs/data.md)
    c.data.repeats = 1  # crops and masks of each decoded image, side by side in a batch; an epoch has as many as before
    c.data.cache = placeholder(int)  # keep every image in memory, its shorter side at most this; unset: no cache
    c.data.color_jitter = 0.0  # strength of brightness, contrast, saturation (and a quarter of it of hue)
    c.data.rand_augment = 0.0  # magnitude of RandAugment, up to 10; 0: none
    c.data.erasing = 0.0  # chance that a box of an image is filled with noise
    c.data.eval_crop = 1.0  # side of the center crop over the resized image's shorter side, in evaluations
    c.data.workers = placeholder(int)  # processes that load and augment; unset: by the number of cores
    c.data.prefetch = 2  # batches kept ready
    c.data.record_seconds = 60.0  # that reading and decoding one record may take; a slower one is bad
    c.data.max_pixels = 100_000_000  # larger images are refused from their header
    c.data.max_bad_fraction = 0.05  # of all records read, or of the last 10,000 and more; more bad ones stop the run

    c.mesh = ConfigDict()  # the product of the axes must be the number of devices; one of them may be -1
    c.mesh.dcn_data = placeholder(int)  # slices, or nodes, that only a slow network connects; unset: a TPU's slices
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    c.sharding = "zero1"  # a name in maejax.sharding.PRESETS

    c.guard = ConfigDict()  # updates that are not finite are never made
    c.guard.spike = 20.0  # nor, in pretraining, those with a gradient norm over so many times its running mean; 0: off
    c.guard.in_a_row = 5  # so many refused in a row: back to the newest checkpoint, and past that data
    c.guard.max_rollbacks = 3  # in a run; after that it ends with exit code 70
    c.guard.compare_steps = 100  # steps between comparisons of what several devices hold alike; 0: never

    c.keep_checkpoints = 3
    c.profile_steps = placeholder(str)  # FIRST:LAST, traced by JAX's profiler into profile/ for XProf
    c.tensorboard = True
    c.wandb = False  # needs the [wandb] extra
    c.evals = ""  # names in maejax.evals.EVALS, with commas between: knn,linear,rankme,accuracy; they need labels
    c.eval_images = 20_000  # of each split, at most, that evaluations during a run look at
    return c.lock()  # values may change, keys may not be added


# ---- From files and to them -----------------------------------------------------------------------------------------


def load(path: str | Path) -> ConfigDict:
    """The config of a recipe file (its `get_config()`), locked."""
    path = find_recipe(path)
    spec = importlib.util.spec_from_file_location(f"maejax_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"config file {path} is not a Python file (NAME.py with a function get_config)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise UsageError(f"config file {path}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config file {path}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return config.lock()


def _one_line(error: BaseException) -> str:
    """What went wrong in a recipe; of an unknown key ml_collections prints the whole config, too."""
    text = str(error).split(" and cannot be added")[0].splitlines() or [""]
    return f"{type(error).__name__}: {text[0].strip(chr(39))}"


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name."""
    path = Path(path)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(recipes_folder().glob("*.py"))}
    if path.stem in known:
        return known[path.stem]
    raise UsageError(f"no config file {path}; shipped recipes: {', '.join(known)}")


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested dictionaries with lists for tuples, as config.json holds them."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(content: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`; keys that this version does not know are refused."""

    def fill(config: ConfigDict, values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if key not in config:
                raise UsageError(f"config.json has the key {prefix}{key}, which this version of maejax does not know")
            if isinstance(value, dict):
                fill(config[key], value, f"{prefix}{key}.")
            else:
                config[key] = tuple(value) if isinstance(value, list) else value

    config = default()
    fill(config, content, "")
    return config.lock()


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of every key whose value differs."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def only_execution(key: str) -> bool:
    """Whether a resumed run may change this key."""
    return any(key == name or key.startswith(f"{name}.") for name in EXECUTION_KEYS)


# ---- Meaning --------------------------------------------------------------------------------------------------------


def pair(value: tuple[Any, ...]) -> tuple[int, int]:
    """(side,) or (height, width) -> (height, width)."""
    return (int(value[0]), int(value[-1]))


def steps(config: ConfigDict, name: str, num_examples: int) -> int:
    """The duration `name` in steps; epochs are passes over `num_examples` records, rounded down to whole steps."""
    for unit in ("steps", "epochs", "examples"):
        value = config[f"{name}_{unit}"]
        if value is not None:
            break
    else:
        number, unit = (DURATIONS[name] or "0 steps").split()
        value = int(number)
    examples = {"steps": value * config.batch_size, "epochs": value * num_examples, "examples": value}[unit]
    return max(int(examples / config.batch_size + 1e-9), 0 if value == 0 else 1)
