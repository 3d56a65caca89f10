"""A number that changes when any bit of an array does, and is the same however the array is split.

sum(bits(x_i) * (2 i + 1)) mod 2^32, over the flat index i. Integers that wrap around add up to the same in any order,
so neither mesh nor processes matter; and an odd weight times a power of two is never 0 modulo 2^32, so no single
flipped bit is missed.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from maejax.tree import PyTree

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(x: Array) -> Array:
    """The fingerprint of an array of up to 4 bytes an element, a uint32 scalar. Traced inside a jit."""
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    weight = jnp.ones(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = 2 * math.prod(x.shape[axis + 1 :]) % 2**32
        weight += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def fingerprints(tree: PyTree) -> PyTree:
    """The fingerprint of every leaf."""
    return jax.tree.map(fingerprint, tree)
