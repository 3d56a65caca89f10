"""The same five steps on every mesh, and mistakes that are told before anything compiles."""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maejax.errors import UsageError
from maejax.mesh import (
    AXES,
    batch_sharding,
    check_batch,
    check_topology,
    fill_axes,
    make_mesh,
    process_share,
    to_global,
)
from maejax.models import Decoder, ViT
from maejax.objectives.mae import MaskedAutoencoder
from maejax.optimizer import make_optimizer, make_schedule
from maejax.program import COMPILER_OPTIONS
from maejax.sharding import PRESETS, spec_for
from maejax.state import init_state, state_shardings
from maejax.step import make_train_step
from maejax.tree import count, named_leaves

B, N, V = 16, 16, 4


def batches(steps=5):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        order = np.stack([rng.permutation(N) for _ in range(B)]).astype(np.int32)
        image = rng.integers(0, 256, (B, 16, 16, 3), dtype=np.uint8)
        yield {"image": image, "visible": order[:, :V], "masked": order[:, V:]}


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape((1,) * (4 - len(sizes)) + sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def run(sizes, preset, accum=1, **model):
    """Losses and gradient norms of five steps, and the state after them."""
    mesh = mesh_of(*sizes)
    objective = MaskedAutoencoder(
        ViT(patch=(4, 4), width=64, depth=3, heads=4, **model), Decoder(pixels=48, width=32, depth=2, heads=4, **model)
    )
    schedule = make_schedule(base_lr=1e-2, min_lr=0, batch_size=B, warmup_steps=2, total_steps=10)
    tx = make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None)
    init = functools.partial(init_state, objective, tx, next(batches()), seed=0, ema=True)
    shardings = state_shardings(jax.eval_shape(init), PRESETS[preset], mesh)
    state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(
        make_train_step(objective, tx, schedule, grad_accum_steps=accum, ema_decay=0.9),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    curve = []
    for batch in batches():
        state, metrics = step(state, to_global(batch, mesh))
        curve.append([float(metrics["train/loss"]), float(metrics["train/grad_norm"])])
    return np.array(curve), state


@pytest.fixture(scope="module")
def alone():
    return run((1, 1, 1), "replicate")


def test_the_run_learns(alone):
    curve, _ = alone
    assert curve[-1, 0] < 0.9 * curve[0, 0]


@pytest.mark.parametrize(
    "sizes, preset",
    [
        ((8, 1, 1), "replicate"),
        ((8, 1, 1), "zero1"),
        ((1, 8, 1), "fsdp"),
        ((4, 2, 1), "fsdp"),
        ((4, 2, 1), "zero1"),
        ((1, 1, 2), "tensor"),
        ((2, 2, 2), "fsdp"),
        ((2, 2, 1, 2), "zero1"),
        ((2, 1, 4, 1), "fsdp"),
    ],
)
def test_every_mesh_computes_the_same_losses(sizes, preset, alone):
    curve, state = run(sizes, preset)
    np.testing.assert_allclose(curve, alone[0], rtol=1e-5)
    for name, leaf in named_leaves(state.params).items():
        if name.endswith("qkv/bias"):  # keys' biases do not change the function: their gradient is nothing but rounding
            continue
        np.testing.assert_allclose(leaf, named_leaves(alone[1].params)[name], rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1)])
def test_accumulation_is_the_same_batch(sizes, alone):
    curve, _ = run(sizes, "zero1", accum=4)
    np.testing.assert_allclose(curve, alone[0], rtol=1e-5)


@pytest.mark.parametrize("model", [{"scan": False}, {"remat": "full"}])
def test_scan_and_remat_train_alike(model, alone):
    curve, _ = run((1, 1, 1), "replicate", **model)
    np.testing.assert_allclose(curve, alone[0], rtol=1e-5)


def bytes_on_first_device(tree):
    device = jax.devices()[0]
    return sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device)


def test_presets_split_what_they_say():
    _, replicated = run((8, 1, 1), "replicate")
    _, zero1 = run((8, 1, 1), "zero1")
    _, fsdp = run((1, 8, 1), "fsdp")
    whole = 4 * count(replicated.params)
    assert bytes_on_first_device(replicated.params) == whole
    # Matrices are all but a few per cent of a network; this tiny one has more in its norms and biases.
    for split in (zero1, fsdp):
        assert bytes_on_first_device(split.params) < 0.2 * whole
        assert bytes_on_first_device(split.opt_state) < 0.2 * bytes_on_first_device(replicated.opt_state)


def test_average_of_the_weights(alone):
    _, state = alone
    initial = run_initial()
    # After five steps of decay 0.9 the average still holds 0.9**5 of the initial weights.
    name = "decoder/pred/kernel"
    average, final, first = (np.asarray(named_leaves(t)[name]) for t in (state.ema, state.params, initial))
    assert np.abs(average - first).mean() < np.abs(final - first).mean()
    assert (average != final).any()


def run_initial():
    objective = MaskedAutoencoder(
        ViT(patch=(4, 4), width=64, depth=3, heads=4), Decoder(pixels=48, width=32, depth=2, heads=4)
    )
    return objective.init(jax.random.key(0), next(batches()))["params"]


def test_axes_are_filled():
    def filled(num_devices, slices=1, dcn_data=None, **sizes):
        return fill_axes({"dcn_data": dcn_data, "data": -1, "fsdp": 1, "tensor": 1} | sizes, num_devices, slices)

    assert filled(8, fsdp=2) == {"dcn_data": 1, "data": 4, "fsdp": 2, "tensor": 1}
    assert filled(8, slices=2, fsdp=2) == {"dcn_data": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert filled(8, slices=2, dcn_data=-1, data=2) == {"dcn_data": 4, "data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(UsageError, match=r"mesh data=3 x fsdp=1 x tensor=1 does not make 8 devices"):
        filled(8, data=3)
    with pytest.raises(UsageError, match=r"mesh dcn_data=3 x data=-1 x fsdp=1 x tensor=1 does not make 8 devices"):
        filled(8, dcn_data=3)
    for sizes in ({"fsdp": 3}, {"data": 0, "fsdp": -1}, {"data": -8, "fsdp": -1}):
        with pytest.raises(UsageError, match="does not make 8 devices"):
            filled(8, **sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device."""

    id: int
    process_index: int
    slice_index: int = 0


def test_every_process_holds_contiguous_rows():
    # Four hosts of two by two chips in a torus that is numbered row by row, as a TPU's is; two slices of them.
    host = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    devices = [Device(16 * s + 4 * y + x, 4 * s + host[y][x], s) for s in (1, 0) for y in range(4) for x in range(4)]
    sizes = {"dcn_data": None, "data": -1, "fsdp": 2, "tensor": 1}
    mesh = make_mesh(sizes, devices)
    assert dict(mesh.shape) == {"dcn_data": 2, "data": 8, "fsdp": 2, "tensor": 1}
    assert [d.slice_index for d in mesh.devices.flat] == [0] * 16 + [1] * 16
    assert [process_share(mesh, p) for p in range(8)] == [(p, 8) for p in range(8)]
    # Eight chips share a row: two hosts hold the same quarter.
    wide = make_mesh(sizes | {"dcn_data": 1, "fsdp": 1, "tensor": 8}, devices)
    assert [process_share(wide, p) for p in range(8)] == [(p // 2, 4) for p in range(8)]


def test_unequal_processes_are_refused():
    devices = [Device(0, 0), Device(1, 1), Device(2, 1), Device(3, 1)]
    mesh = make_mesh({"dcn_data": 1, "data": 4, "fsdp": 1, "tensor": 1}, devices)
    with pytest.raises(UsageError, match=r"process 1 would hold batch shards \[1, 2, 3\] of 4"):
        process_share(mesh, 1)


def test_a_batch_must_divide():
    check_batch(64, mesh_of(4, 2, 1), 4)
    with pytest.raises(UsageError, match="batch_size=60 is not divisible by 8 = 8 batch shards .* use 56 or 64"):
        check_batch(60, mesh_of(4, 2, 1))
    with pytest.raises(UsageError, match="batch_size=16 is not divisible by 32"):
        check_batch(16, mesh_of(8, 1, 1), 4)


def test_a_width_must_divide():
    rules = PRESETS["fsdp"].state
    path, mesh = "encoder/blocks/block/mlp/fc1/kernel", mesh_of(1, 8, 1)
    assert spec_for(path, (3, 64, 256), rules, mesh) == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(UsageError, match=r"cannot be split in 8 along its axis of 60 \(fsdp\)"):
        spec_for(path, (3, 60, 240), rules, mesh)


def test_the_default_works_on_any_number_of_devices():
    path = "0/mu/encoder/blocks/block/mlp/fc1/kernel"
    rules = PRESETS["zero1"].state
    assert spec_for(path, (3, 64, 256), rules, mesh_of(8, 1, 1)) == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert spec_for(path, (3, 60, 240), rules, mesh_of(8, 1, 1)) == PartitionSpec(None, None, "tensor")
    bias = path.replace("kernel", "bias")
    assert spec_for(bias, (3, 256), rules, mesh_of(8, 1, 1)) == PartitionSpec(None, ("tensor", "data", "fsdp"))
    assert spec_for(bias, (3, 250), rules, mesh_of(4, 1, 2)) == PartitionSpec(None, "tensor")


def topologies():
    """Thirty that do not divide the batch: (batch, accumulation, processes, devices each, mesh)."""
    rng, found = random.Random(0), []
    while len(found) < 30:
        batch, steps = rng.choice([12, 16, 60, 100, 256, 4096]), rng.choice([1, 2, 4])
        processes, devices = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([1, 2, 3, 5, 8, None])
        tensor, fsdp = rng.choice([1, 1, 2]), rng.choice([1, 2])
        total = processes * (devices or 1)
        if batch % steps or (devices and total % (tensor * fsdp)):
            continue
        if devices:
            splits = (batch // steps) % (total // tensor) == 0
        else:  # whatever number of devices they have
            shards = [total * d // tensor for d in range(1, 65) if total * d >= tensor]
            splits = any((batch // steps) % parts == 0 for parts in shards)
        if not splits:
            found.append((batch, steps, processes, devices, {"data": -1, "fsdp": fsdp, "tensor": tensor}))
    return found


@pytest.mark.parametrize("batch, steps, processes, devices, sizes", topologies())
def test_topologies_that_do_not_divide_the_batch_are_refused_with_those_that_do(
    batch, steps, processes, devices, sizes, monkeypatch
):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a device was touched"))
    monkeypatch.setattr(jax, "process_count", lambda: pytest.fail("a device was touched"))
    with pytest.raises(UsageError) as refused:
        check_topology({"dcn_data": None, **sizes}, batch, steps, processes=processes, devices=devices)
    text = str(refused.value)
    assert f"batch_size={batch}" in text and f"{processes} process" in text
    legal = [int(number) for number in text.split("; ")[1].removesuffix(" would do").split(", ")]
    assert legal and all((batch // steps) % number == 0 for number in legal) and legal == sorted(set(legal))
    assert len(legal) == min(12, sum((batch // steps) % n == 0 for n in range(1, batch + 1)))


def test_topologies_that_divide_it_are_not_refused():
    for processes, devices, sizes in ((1, 8, {}), (4, 2, {"tensor": 2}), (3, 2, {"tensor": 3}), (2, None, {}),
                                      (4, None, {"tensor": 4})):  # fmt: skip
        all_sizes = {"dcn_data": None, "data": -1, "fsdp": 1, "tensor": 1} | sizes
        check_topology(all_sizes, 16, 2, processes=processes, devices=devices)


def test_options_for_gpus_are_known_to_this_xla():
    """Its compilers for CPU and GPU read the same names, and refuse others."""
    one = jax.jit(lambda x: x + 1).lower(1.0)
    assert one.compile(compiler_options=COMPILER_OPTIONS["gpu"])(1.0) == 2
    with pytest.raises(Exception, match="No such compile option"):
        one.compile(compiler_options={"xla_gpu_hide_latency": True})
