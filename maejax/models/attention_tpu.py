"""Attention on TPUs as one kernel forward and one backward: scores never leave the core's own memory.

XLA writes the float32 scores of every head, (b heads s s), to memory and reads them again several times; and since its
tiles are 128 channels wide, heads of 32 or 64 channels fill a quarter or half of what it moves. Here a program takes a
few whole images and as many heads as fill a tile. All of a sequence fits, so there is no online softmax; nothing but
the input is kept, and the backward kernel computes the scores again.

A matrix unit contracts 128 channels for the price of 32. So a head is not cut out: the other heads' channels of one
operand are set to 0, and the products of whole tiles are the head's own.

Axes: r rows, the tokens of all images one after the other; s tokens of an image; d width; c channels of a head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8  # of a tile: channels, and rows
Ref = Any  # of an array in a kernel: Pallas has no public type for it
VMEM = 32 << 20  # bytes that a program may use, inputs and outputs twice because the next ones are on their way


def fits(rows: int, s: int, d: int, heads: int) -> bool:
    """Whether the kernels can work on so many rows of a device: whole heads fill whole tiles, images fill blocks."""
    return d % _columns(d // heads) == 0 and rows % (s * _images(s)) == 0


def _columns(c: int) -> int:
    """Channels of a program: whole tiles of whole heads."""
    return math.lcm(c, LANES)


def _images(s: int) -> int:
    """Images of a program: the fewest whose rows fill tiles."""
    return SUBLANES // math.gcd(s, SUBLANES)


def count(rows: int, s: int, d: int, heads: int, *, backward: bool) -> dict[str, str]:
    """What a kernel costs, for `maejax plan`, as no compiler estimates it: "matrix_cycles", "programs" and "bytes".

    A matrix unit of 128 x 128 takes 128 cycles for the operand that stays in it and one for each row of the other. Of
    an image and a head, with t = ceil(s / 128) and a window of k tiles, forward has the scores and the weighted values,
    t k tiles each with s rows; backward has the scores, the gradients of weights and of queries, t k tiles with s rows,
    and those of keys and values, t^2 tiles with c rows; and to turn its four (s d) counts a cycle for each tile's row.
    What the vector units do meanwhile takes less. Bytes are those that come from and go to the device's memory. The
    schedules that libtpu 0.0.42 makes of these programs are shorter (benchmarks/NOTES.md, "Step on TPUs").
    """
    c = d // heads
    s_rows, t = -(-s // SUBLANES) * SUBLANES, -(-s // LANES)
    windows = sum(_tiles(head, c) for head in range(0, d, c))
    cycles = windows * t * (3 if backward else 2) * (LANES + s_rows)
    cycles += heads * 2 * t * t * (LANES + c) + 4 * d // LANES * s_rows if backward else 0
    images = rows // s
    found = {
        "matrix_cycles": images * cycles,
        "programs": images // _images(s) * d // _columns(c),
        "bytes": rows * d * 2 * (7 if backward else 4),
    }
    return {name: str(value) for name, value in found.items()}


def _tiles(head: int, c: int) -> int:
    return -(-(head + c) // LANES) - head // LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def attend_rows(qkv: Array, s: int, heads: int, interpret: bool = False) -> Array:
    """Softmax attention within each image: (r 3d), columns being (query, key, value), heads, channels -> (r d).

    Args:
      interpret: compute the kernels operation by operation, for tests on CPUs.
    """
    return _forward(qkv, s, heads, interpret)[0]


def _forward(qkv: Array, s: int, heads: int, interpret: bool) -> tuple[Array, Array]:
    d = qkv.shape[1] // 3
    g, w = _images(s), _columns(d // heads)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, s=s, c=d // heads),
        grid=(qkv.shape[0] // (g * s), d // w),
        in_specs=_thirds(g * s, w, d),
        out_specs=pl.BlockSpec((g * s, w), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((qkv.shape[0], d), qkv.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        interpret=interpret,
        metadata=count(qkv.shape[0], s, d, heads, backward=False),
        name="attention_forward",
    )(qkv, qkv, qkv)
    return out, qkv


def _backward(s: int, heads: int, interpret: bool, qkv: Array, grad: Array) -> tuple[Array]:
    d = qkv.shape[1] // 3
    g, w = _images(s), _columns(d // heads)
    out = pl.pallas_call(
        functools.partial(_backward_kernel, s=s, c=d // heads),
        grid=(qkv.shape[0] // (g * s), d // w),
        in_specs=[*_thirds(g * s, w, d), pl.BlockSpec((g * s, w), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((g * s, 3 * d), lambda i, j: (i, 0)),  # whole rows, filled by the programs of all j
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=VMEM, dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        metadata=count(qkv.shape[0], s, d, heads, backward=True),
        name="attention_backward",
    )(qkv, qkv, qkv, grad)  # fmt: skip
    return (out,)


attend_rows.defvjp(_forward, _backward)


def _thirds(rows: int, w: int, d: int) -> list[pl.BlockSpec]:
    """Where a program finds its queries, keys and values in (r 3d)."""
    return [pl.BlockSpec((rows, w), lambda i, j, part=part: (i, part * (d // w) + j)) for part in range(3)]


def _forward_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, out_ref: Ref, *, s: int, c: int) -> None:
    rows, w = out_ref.shape
    for first in range(0, rows, s):
        q, k, v = (ref[first : first + s] for ref in (q_ref, k_ref, v_ref))
        q = q * jnp.asarray(c**-0.5, q.dtype)
        sums = [jnp.zeros((s, LANES), jnp.float32)] * (w // LANES)
        for head in range(0, w, c):
            tiles, inside = _window(head, c, s)
            weights, total = _weights(q[:, tiles], jnp.where(inside, k[:, tiles], 0))
            out = _dot(weights.astype(v.dtype), jnp.where(inside, v[:, tiles], 0), 1, 0) / total
            _add(sums, tiles, out)
        out_ref[first : first + s] = jnp.concatenate(sums, axis=1).astype(out_ref.dtype)


def _backward_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, grad_ref: Ref, out_ref: Ref, *, s: int, c: int) -> None:
    rows, w = grad_ref.shape
    d, dtype = out_ref.shape[1] // 3, out_ref.dtype
    column = pl.multiple_of(pl.program_id(1) * w, LANES)
    for first in range(0, rows, s):
        q, k, v, grad = (ref[first : first + s] for ref in (q_ref, k_ref, v_ref, grad_ref))
        q = q * jnp.asarray(c**-0.5, q.dtype)
        # The gradients of keys and values are (t c) = (s t)' (s c). Turned round, (c t) = (c s) (s t), they need these
        # and their results transposed, once for all heads of a tile, and no (s t).
        q_t, grad_t = q.T, grad.T
        dq = [jnp.zeros((s, LANES), jnp.float32)] * (w // LANES)
        dk_t, dv_t = [], []
        for head in range(0, w, c):
            tiles, inside = _window(head, c, s)
            keys = jnp.where(inside, k[:, tiles], 0)
            weights, total = _weights(q[:, tiles], keys)
            weights = weights * (1 / total)
            dweights = _dot(grad[:, tiles], jnp.where(inside, v[:, tiles], 0), 1, 1)
            dlogits = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
            weights, dlogits = weights.astype(dtype), dlogits.astype(dtype)
            _add(dq, tiles, _dot(dlogits, keys, 1, 0))
            dk_t.append(_dot(q_t[head : head + c], dlogits, 1, 0))
            dv_t.append(_dot(grad_t[head : head + c], weights, 1, 0))
        parts = (
            (jnp.concatenate(dq, axis=1) * c**-0.5).astype(dtype),
            jnp.concatenate(dk_t, axis=0).astype(dtype).T,
            jnp.concatenate(dv_t, axis=0).astype(dtype).T,
        )
        for part, value in enumerate(parts):
            out_ref[first : first + s, pl.ds(part * d + column, w)] = value


def _window(head: int, c: int, s: int) -> tuple[slice, Array]:
    """The tiles that a head, which begins at channel `head`, lies in; and which of their channels (s .) are its own."""
    start, stop = head // LANES * LANES, -(-(head + c) // LANES) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, (s, stop - start), 1) + start
    return slice(start, stop), (lane >= head) & (lane < head + c)


def _weights(q: Array, k: Array) -> tuple[Array, Array]:
    """Softmax of the scores before the division, float32 (s s), and what to divide by, (s 1)."""
    logits = _dot(q, k, 1, 1)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights, weights.sum(axis=1, keepdims=True)


def _dot(a: Array, b: Array, left: int, right: int) -> Array:
    """Contracts axis `left` of `a` with axis `right` of `b`, in float32."""
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), preferred_element_type=jnp.float32)


def _add(sums: list[Array], tiles: slice, value: Array) -> None:
    for start in range(tiles.start, tiles.stop, LANES):
        sums[start // LANES] = sums[start // LANES] + value[:, start - tiles.start : start - tiles.start + LANES]
