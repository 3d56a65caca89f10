"""A network between two formats: its config, its parameters by flat names on the host, and where they come from."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maejax import bounded, build, runs
from maejax import config as configs
from maejax.convert.names import Arrays, Patch, Shape
from maejax.errors import UsageError
from maejax.models.layers import sincos_positions
from maejax.state import TrainState
from maejax.stored import load_weights, newest_verified, origin_of, save_sealed, weight_shapes
from maejax.tree import PyTree, named_leaves, nest
from maejax.workdir import IMPORTED, record_start

TABLES = ("encoder/pos_embed", "decoder/pos_embed")
CLOSE = 1e-5  # a position table this close to the sine-cosine one is that table


@dataclasses.dataclass(frozen=True)
class Weights:
    """Attributes:
    config: of a run that has this network.
    arrays: float32 parameters by flat name, without position tables that are fixed.
    origin: what is known of them: "source", "license" (None: not known), ...; it travels with them.
    notes: what people should be told.
    """

    config: ConfigDict
    arrays: Arrays
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """encoder, decoder, head, fc_norm: what there is."""
        return {name.split("/")[0] for name in self.arrays}

    @property
    def tree(self) -> PyTree:
        """The parameters as Flax has them."""
        return nest(self.arrays)


def patch_of(c: ConfigDict) -> Patch:
    """Sides and channels of a config's patches."""
    p, q = configs.pair(c.model.patch)
    return Patch(p, q, c.data.channels)


def of_run(run: Path, parts: tuple[str, ...] | None = None) -> Weights:
    """The newest intact weights of a run (or only these of its parts)."""
    c = runs.config_of_run(run)
    folder = newest_verified(run)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in weight_shapes(folder).items()
        if parts is None or name.split("/")[0] in parts
    }
    tree = load_weights(folder, nest(shapes))
    origin = origin_of(folder).get("origin", {"source": None, "license": None})
    return Weights(c, {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}, origin)


def save_run(weights: Weights, run: Path) -> None:
    """Writes a run's folder with one sealed checkpoint, at step 0."""
    record_start(run, weights.config, "none: imported")
    state = TrainState(step=np.zeros((), np.int32), params=weights.tree, opt_state={}, ema={}, stats={})
    meta = {"data": IMPORTED, "bad_images": {}, "origin": weights.origin}
    save_sealed(run / "checkpoints" / "0", state, meta)


def zeros(shape: Shape) -> np.ndarray:
    """float32, placed in memory so that JAX takes it as it is, without a copy."""
    numbers = np.zeros(math.prod(shape) + 16, np.float32)
    start = -numbers.ctypes.data // 4 % 16
    return numbers[start : start + math.prod(shape)].reshape(shape)


# ---- Position tables ------------------------------------------------------------------------------------------------


def fixed_table(grid: tuple[int, int], width: int, cls_token: bool) -> np.ndarray:
    """The sine-cosine table, float32 (1 [1+]n d), with zeros for the class token."""
    return np.concatenate([np.zeros((int(cls_token), width), np.float32), sincos_positions(grid, width)])[None]


def with_tables(weights: Weights) -> Arrays:
    """The arrays with every position table written out, for formats that store them."""
    c, arrays = weights.config, dict(weights.arrays)
    grid = build.shapes_of(c).grid
    for name in TABLES:
        part = name.split("/")[0]
        if part in weights.parts and name not in arrays:
            width = arrays[f"{part}/embed/bias"].shape[0]
            arrays[name] = fixed_table(grid, width, c.model.cls_token)
    return arrays


def without_tables(where: str, arrays: Arrays, c: ConfigDict, theirs: Mapping[str, str]) -> tuple[Arrays, ConfigDict]:
    """The inverse: tables that are the sine-cosine one are dropped; the encoder's may also be another ("learned").

    `theirs`: what the file calls them.
    """
    arrays, grid = dict(arrays), build.shapes_of(c).grid
    for name in [name for name in TABLES if name in arrays]:
        table = arrays[name]
        fixed = fixed_table(grid, table.shape[-1], c.model.cls_token)
        if np.abs(table - fixed).max() <= CLOSE:
            del arrays[name]
        elif name.startswith("decoder"):
            zero = " (it is all zeros, as transformers leaves it in a model that was not loaded)" * (not table.any())
            raise UsageError(
                f"{where}: tensor {theirs[name]} is not the fixed sine-cosine table that the decoder computes{zero}"
            )
        else:
            c = configs.from_dict(configs.to_dict(c))
            c.model.positions = "learned"
    return arrays, c


# ---- What writers of other formats need to know ----------------------------------------------------------------------


def facts(weights: Weights) -> dict[str, Any]:
    """Sizes and settings by plain names."""
    c, arrays = weights.config, weights.arrays
    s = build.shapes_of(c)
    width, depth, heads = build.encoder_size(c)
    mean, std = (
        [float(x) for x in values] * (s.channels if len(values) == 1 else 1) for values in (c.data.mean, c.data.std)
    )
    return {
        "size": c.model.size, "image": s.image, "patch": s.patch, "channels": s.channels, "width": width,
        "depth": depth, "heads": heads, "mlp_ratio": build.mlp_ratio(c), "hidden": round(build.mlp_ratio(c) * width),
        "cls_token": c.model.cls_token, "mean": mean, "std": std, "mask_ratio": c.mask.ratio, "norm_pix": c.norm_pix,
        "decoder_width": c.decoder.width, "decoder_depth": c.decoder.depth, "decoder_heads": c.decoder.heads,
        "has_decoder": "decoder" in weights.parts,
        "classes": arrays["head/bias"].shape[0] if "head/bias" in arrays else 0,
        "fc_norm": "fc_norm/scale" in arrays, "learned": "encoder/pos_embed" in arrays,
        "pool": None if "head/bias" not in arrays else ("avg" if "fc_norm/scale" in arrays else "token"),
    }  # fmt: skip


def network_shapes(c: ConfigDict, parts: set[str], classes: int) -> dict[str, Shape]:
    """The parameters of a config's network by flat name, tables included."""
    s = build.shapes_of(c)
    width, depth, heads = build.encoder_size(c)
    tokens = s.patches + int(c.model.cls_token)

    def stack(part: str, d: int, layers: int, num_heads: int, hidden: int) -> dict[str, Shape]:
        inner = {
            "norm1/scale": (d,), "norm1/bias": (d,), "norm2/scale": (d,), "norm2/bias": (d,),
            "attn/qkv/kernel": (d, 3, num_heads, d // num_heads), "attn/qkv/bias": (3, num_heads, d // num_heads),
            "attn/proj/kernel": (num_heads, d // num_heads, d), "attn/proj/bias": (d,),
            "mlp/fc1/kernel": (d, hidden), "mlp/fc1/bias": (hidden,), "mlp/fc2/kernel": (hidden, d),
            "mlp/fc2/bias": (d,),
        }  # fmt: skip
        outer = {"pos_embed": (1, tokens, d), "norm/scale": (d,), "norm/bias": (d,)}
        blocks = {f"{part}/blocks/block/{name}": (layers, *shape) for name, shape in inner.items()}
        return {f"{part}/{name}": shape for name, shape in outer.items()} | blocks

    found = stack("encoder", width, depth, heads, round(build.mlp_ratio(c) * width))
    found |= {"encoder/embed/kernel": (s.pixels, width), "encoder/embed/bias": (width,)}
    if c.model.cls_token:
        found["encoder/cls_token"] = (1, 1, width)
    if "fc_norm" in parts:
        found |= {"fc_norm/scale": (width,), "fc_norm/bias": (width,)}
        del found["encoder/norm/scale"], found["encoder/norm/bias"]
    if "head" in parts:
        found |= {"head/kernel": (width, classes), "head/bias": (classes,)}
    if "decoder" in parts:
        d = c.decoder.width
        found |= stack("decoder", d, c.decoder.depth, c.decoder.heads, 4 * d)
        found |= {
            "decoder/mask_token": (1, 1, d), "decoder/embed/kernel": (width, d), "decoder/embed/bias": (d,),
            "decoder/pred/kernel": (d, s.pixels), "decoder/pred/bias": (s.pixels,),
        }  # fmt: skip
    return found


def is_run(path: Path) -> bool:
    """Whether a folder is a run of maejax, and not of another tool whose folders have a config.json, too."""
    file = path / "config.json"
    if not file.is_file():
        return False
    try:
        return "objective" in bounded.read_json(file)
    except (ValueError, OSError, TypeError):
        return False
