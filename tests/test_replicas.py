"""Fingerprints, and bits that were flipped in one replica."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planted import flip

from maejax.errors import SilentCorruption
from maejax.fingerprint import fingerprint
from maejax.interruption import StepEnd
from maejax.mesh import make_mesh
from maejax.replicas import CompareReplicas
from maejax.sharding import with_shardings
from maejax.state import TrainState


def by_hand(x):
    """In Python's own integers."""
    raw = np.ascontiguousarray(x).reshape(-1)
    bits = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[raw.itemsize])
    return sum(int(value) * (2 * i + 1) for i, value in enumerate(bits)) % 2**32


ARRAYS = {
    "scalar": np.float32(3.5), "count": np.int32(-7), "vector": np.linspace(-1, 1, 37, dtype=np.float32),
    "matrix": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
    "stack": np.random.default_rng(1).normal(size=(2, 8, 3, 5)).astype(jnp.bfloat16),
    "nan": np.array([np.nan, np.inf, -0.0, 0.0], np.float32), "bytes": np.arange(200, dtype=np.uint8),
    "flags": np.array([True, False, True]), "empty": np.zeros((0, 3), np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_fingerprints_against_python(name):
    assert int(jax.jit(fingerprint)(ARRAYS[name])) == by_hand(ARRAYS[name])


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "data"), P("fsdp", "data"), P(("data", "fsdp"))])
def test_fingerprints_do_not_depend_on_the_mesh(spec):
    mesh = make_mesh({"dcn_data": 1, "data": 4, "fsdp": 2, "tensor": 1})
    placed = jax.device_put(ARRAYS["matrix"], NamedSharding(mesh, spec))
    assert int(jax.jit(fingerprint)(placed)) == by_hand(ARRAYS["matrix"])


def state_on(mesh, split):
    """A state whose matrix is split as said, everything else whole."""

    def put(x, spec=None):
        return jax.device_put(x, NamedSharding(mesh, spec or P()))

    params = {"kernel": put(ARRAYS["matrix"], split), "bias": put(ARRAYS["vector"])}
    moments = {"mu": {"kernel": put(ARRAYS["matrix"] / 3, split)}, "count": put(ARRAYS["count"])}
    return TrainState(step=put(np.int32(5)), params=params, opt_state=moments, ema={}, stats={})


def comparing(state, mesh, every=1):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return CompareReplicas(with_shardings(shapes, shardings), mesh, every=every)


def end(state, step=1):
    return StepEnd(step=step, state=state, metrics={}, data_wait=0.0, faults=())


def with_flip(state, part, leaf, device, element, bit):
    tree = getattr(state, part)
    return dataclasses.replace(state, **{part: tree | {leaf: flip(tree[leaf], device, element, bit)}})


WHOLE = {"dcn_data": 1, "data": 8, "fsdp": 1, "tensor": 1}
SLICES = {"dcn_data": 2, "data": 2, "fsdp": 2, "tensor": 1}


def test_fifty_flips_are_fifty_findings():
    rng, mesh = random.Random(0), make_mesh(WHOLE)
    state = state_on(mesh, P())
    compare = comparing(state, mesh)
    for _ in range(50):
        device = rng.choice(jax.devices())
        leaf = rng.choice(["kernel", "bias"])
        broken = with_flip(state, "params", leaf, device, rng.randrange(state.params[leaf].size), rng.randrange(32))
        compare.now(end(state))
        expected = rf"params/{leaf} on process 0, device {device.id} \(cpu\)\. The newest checkpoint"
        with pytest.raises(SilentCorruption, match=expected):
            compare.now(end(broken))


def test_what_is_split_is_compared_between_slices_only():
    mesh = make_mesh(SLICES)
    state = state_on(mesh, P("fsdp", "data"))
    compare = comparing(state, mesh)
    compare.now(end(state))
    # Every quarter of the kernel lies in both slices; of two that differ, nobody knows which is right.
    broken = with_flip(state, "params", "kernel", jax.devices()[6], 3, 30)
    with pytest.raises(SilentCorruption, match=r"params/kernel on one of process 0, device 2 .* device 6 "):
        compare.now(end(broken))
    # Split over all devices there is nothing to compare with; what is whole still is.
    mesh = make_mesh(WHOLE)
    state = state_on(mesh, P("data"))
    compare = comparing(state, mesh)
    compare.now(end(with_flip(state, "params", "kernel", jax.devices()[6], 3, 30)))
    with pytest.raises(SilentCorruption, match="params/bias on process 0, device 6"):
        compare.now(end(with_flip(state, "params", "bias", jax.devices()[6], 3, 30)))


def test_it_is_found_one_step_later_at_the_interval():
    mesh = make_mesh(WHOLE)
    state = state_on(mesh, P())
    broken = with_flip(state, "opt_state", "count", jax.devices()[1], 0, 31)
    compare = comparing(state, mesh, every=4)
    for step in range(1, 5):
        compare(end(broken, step))
    with pytest.raises(SilentCorruption, match="replicas differ at step 4: opt_state/count on process 0, device 1"):
        compare(end(broken, 5))
    never = comparing(state, mesh, every=0)
    never(end(broken, 4))
    never.now(end(broken, 4))


def test_one_device_has_nothing_to_compare():
    mesh = make_mesh({"dcn_data": 1, "data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    state = state_on(mesh, P())
    compare = comparing(state, mesh)
    compare.now(end(state))
    assert compare._compare._cache_size() == 0  # nothing was even compiled
