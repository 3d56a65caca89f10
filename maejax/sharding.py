"""Which axis of which parameter lies on which mesh axis: rules by path, and presets of rules.

A rule is `(pattern, PartitionSpec)`; the first whose pattern is found in a leaf's path decides, and a leaf that none
matches is whole on every device. Moments and averages have the paths of their parameters, so the rules serve them too.
"""

import math
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from maejax.errors import UsageError
from maejax.tree import PyTree, map_named

Axis = str | tuple[str, ...] | None
Rules = tuple[tuple[str, P], ...]


def split_over(axis: Axis) -> Rules:
    """Rules that split every matrix over `axis` along the network's width, and heads and hidden units over `tensor`.

    The first axis of `blocks/` is the stack of layers and never split.
    """
    return (
        (r"blocks/.*/qkv/kernel$", P(None, axis, None, "tensor", None)),  # layer, width, qkv, heads, channels
        (r"blocks/.*/qkv/bias$", P(None, None, "tensor", None)),
        (r"blocks/.*/q/kernel$", P(None, axis, "tensor", None)),  # of cross-attention
        (r"blocks/.*/q/bias$", P(None, "tensor", None)),
        (r"blocks/.*/kv/kernel$", P(None, axis, None, "tensor", None)),
        (r"blocks/.*/kv/bias$", P(None, None, "tensor", None)),
        (r"blocks/.*/proj/kernel$", P(None, "tensor", None, axis)),  # layer, heads, channels, width
        (r"blocks/.*/fc1/kernel$", P(None, axis, "tensor")),
        (r"blocks/.*/fc1/bias$", P(None, "tensor")),
        (r"blocks/.*/fc2/kernel$", P(None, "tensor", axis)),
        (r"encoder/embed/kernel$", P(None, axis)),  # pixels, width
        (r"decoder/embed/kernel$", P(axis, None)),
        (r"decoder/pred/kernel$", P(axis, None)),
    )


def split_state_over(axes: tuple[str, ...]) -> Rules:
    """Rules that split vectors, too, over `axes`: for what lies between steps."""
    return (
        (r"blocks/.*/fc1/bias$", P(None, ("tensor", *axes))),
        (r"blocks/.*/(norm\w+/scale|norm\w+/bias|proj/bias|fc2/bias)$", P(None, axes)),
        *split_over(axes),
    )


class Preset(NamedTuple):
    """Where things lie.

    Attributes:
    state: parameters, the optimizer's moments and the average, between steps.
    work: the copy of the parameters that a step works with, made once a step.
    layer: the copy of one layer of that, made when the layer is computed, forward and again backward; None: as it is.
    use: what it is for.

    Copies are made in the dtype of the products, which moves half the bytes of float32 parameters.
    """

    state: Rules
    work: Rules
    layer: Rules | None
    use: str


WHOLE = split_over(None)  # but for `tensor`
LAYERS_SPLIT = tuple(rule for rule in split_over("fsdp") if rule[0].startswith("blocks/"))
PRESETS: dict[str, Preset] = {
    "replicate": Preset((), (), None, "everything whole on every device"),
    "zero1": Preset(
        split_state_over(("data", "fsdp")), WHOLE, None, "state split, work whole; the default, up to ViT-H"
    ),
    "fsdp": Preset(split_over("fsdp"), LAYERS_SPLIT, WHOLE, "one layer whole at a time; 2B parameters and more"),
    "tensor": Preset(WHOLE, WHOLE, None, "heads and hidden units over tensor, nothing else"),
}


def spec_for(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    """The PartitionSpec of one leaf.

    What cannot be split evenly over the `data` axis stays whole there (and over `fsdp`): that split is a saving, nobody
    asked for it by name. Over `fsdp` alone and over `tensor` it is a UsageError.
    """
    for pattern, spec in rules:
        if not re.search(pattern, path):
            continue
        return P(*(_split(path, shape, size, axis, mesh) for size, axis in zip(shape, tuple(spec), strict=True)))
    return P()


def _split(path: str, shape: tuple[int, ...], size: int, axis: Axis, mesh: Mesh) -> Axis:
    """`axis`, if `size` can be split over it."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts == 0:
        return axis
    if "data" in names:
        return _split(path, shape, size, "tensor", mesh) if "tensor" in names else None
    raise UsageError(
        f"{path} {shape} cannot be split in {parts} along its axis of {size} ({' x '.join(names)}); "
        f"make mesh.{names[-1]} a divisor of {size} or choose another sharding ({', '.join(PRESETS)})"
    )


def shard_tree(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    return map_named(lambda path, leaf: NamedSharding(mesh, spec_for(path, leaf.shape, rules, mesh)), tree)


def working_copy(params: PyTree, preset: Preset, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """The parameters as a step uses them: what lies elsewhere in the state is cast to `dtype` and brought to its place.

    Matrices are cast to `dtype` where they are used: casting them first changes nothing but the bytes. Vectors move as
    they are. Traced inside a jit.
    """

    def place(path: str, leaf: jax.Array) -> jax.Array:
        here, there = (spec_for(path, leaf.shape, rules, mesh) for rules in (preset.state, preset.work))
        return _moved(leaf, here, there, mesh, dtype if path.endswith("kernel") else leaf.dtype)

    return map_named(place, params)


def layer_copy(params: PyTree, preset: Preset, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """The same for one layer of a stack, whose leaves lack the first axis."""

    def place(path: str, leaf: jax.Array) -> jax.Array:
        rules = (preset.work, preset.layer or preset.work)
        here, there = (P(*spec_for(f"blocks/block/{path}", (1, *leaf.shape), r, mesh)[1:]) for r in rules)
        return _moved(leaf, here, there, mesh, dtype if path.endswith("kernel") else leaf.dtype)

    return map_named(place, params)


def _moved(leaf: jax.Array, here: P, there: P, mesh: Mesh, dtype: DTypeLike) -> jax.Array:
    if here == there:
        return leaf
    leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(mesh, here))  # cast before it is sent
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, there))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that carry shardings: what a checkpoint is restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
