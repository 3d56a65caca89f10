"""The config of a run that has the network in a file of weights.

Sizes are taken from the tensors themselves, and only what tensors do not tell (heads, image size, targets, mean and
deviation) from what lies beside them, from the command line, or from what is usual.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from maejax import build
from maejax import config as configs
from maejax.check import check
from maejax.convert import facebook
from maejax.convert.names import CONVOLUTION, FLAX_CONVOLUTION, Patch, Rule, Shape, stack_depth
from maejax.convert.source import Found, json_of
from maejax.errors import UsageError
from maejax.models import SIZES

Notes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Hints:
    """What tensors do not tell, from the command line; None: look beside them."""

    norm_pix: bool | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, ...] | None = None


def infer(found: Found, shapes: Mapping[str, Shape], hints: Hints) -> tuple[ConfigDict, set[str], int, Notes]:
    """The config, the network's parts, its number of classes, and what to tell people."""
    present = {rule.ours.split("/")[0] for rule in found.table if rule.theirs.replace("{i}", "0") in shapes}
    sizes, stored = _Sizes(found, shapes), found.stored
    classes = sizes.matrix("head/kernel")[1] if "head" in present else 0
    if stored is not None and found.format == "safetensors":  # every shape will be compared with it
        return stored, present, classes, ()
    beside = _huggingface(found) if found.format == "huggingface" else _timm(found)
    c = configs.from_dict(configs.to_dict(configs.default() if stored is None else stored))
    c.unlock()
    notes = _set_encoder(c, found, sizes, beside, hints)
    if stored is None:
        notes += _set_images(c, found, sizes, beside, hints)
    if "decoder" in present:
        notes += _set_decoder(c, found, sizes, beside, hints)
    if "head" in present:
        c.objective = "classify"
        c.finetune.num_classes, c.finetune.pool = classes, "mean" if "fc_norm" in present else "cls"
    if c.total_steps is None and c.total_epochs is None and c.total_examples is None:
        c.total_steps = 1  # a config needs a length; nothing trains with this one
    c.lock()
    try:
        check(c)
        build.check_names(c)
    except UsageError as error:
        raise UsageError(f"{found.where}: {error}") from error
    return c, present, classes, notes


def _set_encoder(c: ConfigDict, found: Found, sizes: "_Sizes", beside: Mapping[str, Any], hints: Hints) -> Notes:
    patch, width = sizes.patch()
    depth, heads = sizes.depth("encoder"), hints.heads or beside.get("heads")
    if found.format == "big_vision":
        heads = sizes.shape("encoder/blocks/block/attn/qkv/kernel")[1]
    stored = None if found.stored is None else build.encoder_size(c)
    heads = heads or (stored[2] if stored else {w: h for w, _, h in SIZES.values()}.get(width))
    if not heads or width % heads:
        raise UsageError(f"{found.where}: the width {width} does not say how many attention heads; give --heads=N")
    if stored != (width, depth, heads):
        named = [name for name, size in SIZES.items() if size == (width, depth, heads)]
        c.model.size = named[0] if named else "B"
        c.model.width, c.model.depth, c.model.heads = (None, None, None) if named else (width, depth, heads)
    if configs.pair(c.model.patch) != (patch.p, patch.q):
        c.model.patch = (patch.p,) if patch.p == patch.q else (patch.p, patch.q)
    hidden = sizes.matrix("encoder/blocks/block/mlp/fc1/kernel")[1]
    if round(build.mlp_ratio(c) * width) != hidden:
        c.model.width, c.model.depth, c.model.heads = width, depth, heads  # no named size has its own ratio here
        c.model.mlp_ratio = hidden / width
    c.model.cls_token = sizes.has("encoder/cls_token")
    c.data.channels = patch.c
    eps = beside.get("eps", 1e-6)
    return () if eps == 1e-6 else (f"config.json has layer_norm_eps {eps:g}; maejax computes with 1e-6, as MAE does",)


def _set_images(c: ConfigDict, found: Found, sizes: "_Sizes", beside: Mapping[str, Any], hints: Hints) -> Notes:
    """Image size, mean and deviation."""
    table, (p, q) = sizes.shape("encoder/pos_embed"), configs.pair(c.model.patch)
    n = table[1] - int(c.model.cls_token and found.format != "big_vision") if len(table) == 3 else 0
    side = math.isqrt(max(n, 0))
    image = hints.image_size or beside.get("image") or (side * p, side * q)
    h, w = configs.pair(image)
    if n < 1 or (h // p) * (w // q) != n or h % p or w % q:
        name = sizes.rule("encoder/pos_embed").theirs
        raise UsageError(
            f"{found.where}: tensor {name} has {n} places, images of {h}x{w} {(h // p) * (w // q)} patches of {p}x{q}; "
            "give --image-size=HEIGHT,WIDTH"
        )
    c.image_size = (h,) if h == w else (h, w)
    mean, std, channels = beside.get("mean"), beside.get("std"), c.data.channels
    if mean and std and len(mean) == len(std) and len(mean) in (1, channels):
        c.data.mean, c.data.std = tuple(mean), tuple(std)
        return ()
    if channels == 3:
        return ()  # ImageNet's, which config.default() has and everything of MAE's was trained with
    c.data.mean, c.data.std = (0.5,), (0.5,)
    return (f"mean and deviation of the {channels} channels are not known: taken as 0.5; see data.mean in config.json",)


def _set_decoder(c: ConfigDict, found: Found, sizes: "_Sizes", beside: Mapping[str, Any], hints: Hints) -> Notes:
    """Its size, and what it was trained to regress."""
    width, depth = sizes.matrix("decoder/embed/kernel")[1], sizes.depth("decoder")
    usual = c.decoder.heads if found.stored is not None else facebook.DECODER_HEADS
    heads = hints.decoder_heads or beside.get("decoder_heads") or usual
    if width % heads:
        raise UsageError(
            f"{found.where}: the decoder's width {width} is no multiple of {heads} heads; --decoder-heads=N"
        )
    hidden = sizes.matrix("decoder/blocks/block/mlp/fc1/kernel")[1]
    if hidden != 4 * width:
        raise UsageError(f"{found.where}: the decoder's MLPs are {hidden} wide; maejax has {4 * width}, 4 x its width")
    c.decoder.width, c.decoder.depth, c.decoder.heads = width, depth, heads
    if "mask_ratio" in beside:
        c.mask.ratio = beside["mask_ratio"]
    if hints.norm_pix is not None:
        c.norm_pix = hints.norm_pix
    elif "norm_pix" in beside:
        c.norm_pix = beside["norm_pix"]
    elif found.stored is None:
        named = facebook.released_targets(found.where.name)
        if named is None:
            raise UsageError(
                f"{found.where} does not say whether its decoder regresses normalised patches; "
                "give --norm-pix (as the official ..._full.pth) or --no-norm-pix (as mae_visualize_...)"
            )
        c.norm_pix = named
        return (f"norm_pix={named}, by the file's name",)
    return ()


class _Sizes:
    """Sizes of a network by the shapes of its tensors."""

    def __init__(self, found: Found, shapes: Mapping[str, Shape]):
        self._found, self._shapes = found, shapes

    def rule(self, ours: str) -> Rule:
        """The first rule of a parameter."""
        return next(rule for rule in self._found.table if rule.ours == ours)

    def shape(self, ours: str) -> Shape:
        """Their shape of a parameter (of the first block)."""
        name = self.rule(ours).theirs.replace("{i}", "0")
        if name not in self._shapes:
            raise UsageError(f"{self._found.where}: tensor {name} is missing")
        return self._shapes[name]

    def matrix(self, ours: str) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        shape = self.shape(ours)
        if len(shape) < 2:
            raise UsageError(
                f"{self._found.where}: tensor {self.rule(ours).theirs} has shape {shape}, expected a matrix"
            )
        return (shape[-1], shape[-2]) if self.rule(ours).layout.order else (shape[-2], shape[-1])

    def has(self, ours: str) -> bool:
        """Whether there is such a parameter."""
        return self.rule(ours).theirs.replace("{i}", "0") in self._shapes

    def depth(self, part: str) -> int:
        """Blocks of a part."""
        return stack_depth(str(self._found.where), self._found.table, part, self._shapes)

    def patch(self) -> tuple[Patch, int]:
        """The patch, and the encoder's width."""
        shape = self.shape("encoder/embed/kernel")
        if len(shape) == 4 and self.rule("encoder/embed/kernel").layout is CONVOLUTION:
            return Patch(shape[2], shape[3], shape[1]), shape[0]
        if len(shape) == 4 and self.rule("encoder/embed/kernel").layout is FLAX_CONVOLUTION:
            return Patch(*shape[:3]), shape[3]
        name = self.rule("encoder/embed/kernel").theirs
        raise UsageError(f"{self._found.where}: tensor {name} has shape {shape}, expected four axes")


# ---- What lies beside -----------------------------------------------------------------------------------------------


def _typed(
    found: Found, content: Mapping[str, Any], keys: Mapping[str, str], kinds: tuple[type, ...]
) -> dict[str, Any]:
    """{our key: value} of those keys that are there; raises UsageError for one of another type, or not positive."""
    values: dict[str, Any] = {}
    for theirs, ours in keys.items():
        value: Any = content.get(theirs)
        if value is None:
            continue
        items = value if isinstance(value, list) and tuple in kinds else [value]
        counts = [item for item in items if type(item) is int and float not in kinds]
        if not items or not all(isinstance(item, kinds) for item in items) or any(count < 1 for count in counts):
            raise UsageError(f"{found.where.parent / 'config.json'}: {theirs}={value!r} makes no sense")
        values[ours] = tuple(items) if tuple in kinds else value
    return values


def _huggingface(found: Found) -> dict[str, Any]:
    """config.json and preprocessor_config.json of a transformers folder."""
    content = found.beside
    if content.get("model_type", "vit_mae") not in ("vit_mae", "vit"):
        raise UsageError(f"{found.where}: model_type={content['model_type']!r} is not one of vit_mae, vit")
    if content.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{found.where}: hidden_act={content['hidden_act']!r}; maejax computes the exact gelu")
    preprocessor = json_of(found.where.parent / "preprocessor_config.json")
    whole = {"num_attention_heads": "heads", "decoder_num_attention_heads": "decoder_heads"}
    values = _typed(found, content, whole, (int,))
    values |= _typed(found, content, {"image_size": "image"}, (int, tuple))
    values |= _typed(found, content, {"layer_norm_eps": "eps", "mask_ratio": "mask_ratio"}, (float,))
    values |= _typed(found, content, {"norm_pix_loss": "norm_pix"}, (bool,))
    values |= _typed(found, preprocessor, {"image_mean": "mean", "image_std": "std"}, (int, float, tuple))
    if content and content.get("model_type") == "vit_mae":
        values.setdefault("norm_pix", False)  # transformers' default, which older files leave out
        values.setdefault("eps", 1e-12)
    return values


def _timm(found: Found) -> dict[str, Any]:
    """config.json of a timm folder."""
    arguments = found.beside.get("model_args") or {}
    pretrained = found.beside.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(pretrained, dict):
        raise UsageError(f"{found.where.parent / 'config.json'}: model_args and pretrained_cfg must be objects")
    values = _typed(found, arguments, {"num_heads": "heads"}, (int,))
    values |= _typed(found, pretrained, {"mean": "mean", "std": "std"}, (int, float, tuple))
    size = _typed(found, pretrained, {"input_size": "image"}, (int, tuple))
    if len(size.get("image", ())) == 3:
        values["image"] = size["image"][1:]
    return values | _typed(found, arguments, {"img_size": "image"}, (int, tuple))
