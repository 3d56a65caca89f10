"""Names of a pytree's leaves: decay groups, sharding rules and checkpoints all go by them."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as "encoder/blocks/block/mlp/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`function(name, leaf, ...)` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its name."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: PyTree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `named_leaves` for trees of dictionaries."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree
