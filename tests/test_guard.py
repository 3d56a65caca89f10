"""The guard inside the step, against numpy and against runs that never saw the bad batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maejax.guard import HORIZON, judge, new_guard
from maejax.mesh import AXES, batch_sharding, to_global
from maejax.optimizer import make_optimizer, make_schedule
from maejax.sharding import PRESETS
from maejax.state import init_state, state_shardings
from maejax.step import make_train_step

B = 16


class Line(nn.Module):
    """A regression whose loss a batch multiplies with its rows' mean `factor`, with statistics as a batch norm has."""

    @nn.compact
    def __call__(self, batch):
        seen = self.variable("batch_stats", "seen", lambda: jnp.zeros(()))
        if not self.is_initializing():
            seen.value = seen.value + batch["factor"].mean()
        predicted = nn.Dense(1)(nn.Dense(8)(batch["x"]))[:, 0]
        return (jnp.square(predicted - batch["y"]) * batch["factor"]).mean(), {}


def batch_of(number, factor=1.0, rows=slice(0, 1)):
    """Batch `number` of a stream; some rows (of the first device alone) have another factor."""
    rng = np.random.default_rng(number)
    factors = np.ones(B, np.float32)
    factors[rows] = factor
    return {
        "x": rng.normal(size=(B, 4)).astype(np.float32), "y": rng.normal(size=B).astype(np.float32), "factor": factors
    }  # fmt: skip


@functools.cache
def machine(devices=8, name="adamw", accum=1, clip=None, spike=20.0):
    """A jitted step and its first state, with an average."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1), AXES)
    schedule = make_schedule(base_lr=1e-2, min_lr=0, batch_size=256, warmup_steps=20, total_steps=300)
    tx = make_optimizer(schedule, name=name, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=clip)
    init = functools.partial(init_state, Line(), tx, batch_of(0), seed=0, ema=True)
    shardings = state_shardings(jax.eval_shape(init), PRESETS["zero1"], mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        make_train_step(Line(), tx, schedule, grad_accum_steps=accum, ema_decay=0.9, spike=spike),
        in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, whole),
    )  # fmt: skip
    state = jax.jit(init, out_shardings=shardings)()
    # One step at a time: virtual devices that meet in two programs at once can run out of threads.
    return lambda state, batch: jax.block_until_ready(step(state, to_global(batch, mesh))), state


def weights(state):
    """All that a skipped step may not touch."""
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema, state.stats))


def assert_same_bits(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    assert all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 1e38])  # the last: finite, but not its gradient's square
@pytest.mark.parametrize("at", [0, 1, 63, 64, 200])
def test_a_bad_step_is_as_if_it_had_not_been(at, factor):
    step, clean = machine()
    state = clean
    for number in range(at):
        state, metrics = step(state, batch_of(number))
    assert int(state.guard["skipped"]) == 0
    before = weights(state)
    state, metrics = step(state, batch_of(at, factor))
    assert_same_bits(weights(state), before)
    assert int(state.step) == at + 1 and int(metrics["guard/skipped"]) == int(metrics["guard/in_a_row"]) == 1
    # From here on it is a run that saw other batches, with a step less behind it.
    for number in range(at + 1, at + 4):
        state, metrics = step(state, batch_of(number))
    assert int(metrics["guard/skipped"]) == 1 and int(metrics["guard/in_a_row"]) == 0
    for number in [*range(at), *range(at + 1, at + 4)]:
        clean, expected = step(clean, batch_of(number))
    assert_same_bits(weights(state), weights(clean))
    assert metrics["train/lr"] == expected["train/lr"]


@pytest.mark.parametrize("kind", [{"name": "lars"}, {"accum": 2}, {"clip": 1.0}, {"devices": 1}])
def test_other_steps_are_guarded_alike(kind):
    step, state = machine(**kind)
    for number in range(3):
        state, _ = step(state, batch_of(number))
    before = weights(state)
    for factor in (np.nan, np.inf):
        state, metrics = step(state, batch_of(3, factor, rows=slice(B - 1, B)))
        assert_same_bits(weights(state), before)
    assert int(metrics["guard/in_a_row"]) == 2
    state, metrics = step(state, batch_of(4))
    assert int(metrics["guard/in_a_row"]) == 0 and int(metrics["guard/skipped"]) == 2
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(weights(state)), jax.tree.leaves(before)))


def test_spikes_are_refused_once_the_mean_is_known():
    step, state = machine()
    everything = slice(None)
    state, metrics = step(state, batch_of(0, 1000.0, everything))  # too early to tell; and it does not blind the mean
    assert int(metrics["guard/skipped"]) == 0
    norms = [float(metrics["train/grad_norm"])]
    for number in range(1, HORIZON):
        state, metrics = step(state, batch_of(number))
        norms.append(float(metrics["train/grad_norm"]))
    mean = np.exp(np.mean(np.log(norms)))
    assert np.exp(state.guard["log_norm"]) == pytest.approx(mean, rel=1e-4)
    before = weights(state)
    for factor, refused in ((10.0, 0), (1e3, 1), (1e6, 2)):  # norms go with the factor
        after, metrics = step(state, batch_of(500, factor, everything))
        assert (metrics["train/grad_norm"] > 20 * mean) == (refused > 0), (metrics, mean)
        assert int(metrics["guard/skipped"]) == min(refused, 1)
        if refused:
            assert_same_bits(weights(after), before)
            assert after.guard["log_norm"] == state.guard["log_norm"]


def test_the_verdict_by_hand():
    guard = {"skipped": 2, "in_a_row": 2, "measured": HORIZON, "log_norm": jnp.float32(0.0)}
    for loss, norm, spike, accepted in (
        (1.0, 1.0, 20.0, True), (1.0, 19.9, 20.0, True), (1.0, 20.1, 20.0, False), (1.0, 1e9, 0.0, True),
        (np.nan, 1.0, 0.0, False), (1.0, np.inf, 0.0, False), (1.0, 0.0, 20.0, True), (-np.inf, 1.0, 20.0, False),
    ):  # fmt: skip
        verdict, after = judge(guard, jnp.float32(loss), jnp.float32(norm), spike=spike)
        assert bool(verdict) == accepted, (loss, norm, spike)
        assert after["skipped"] == (2 if accepted else 3) and after["in_a_row"] == (0 if accepted else 3)
        moved = np.log(norm) / HORIZON if accepted and norm > 0 else 0.0
        assert after["log_norm"] == pytest.approx(moved, abs=1e-6)
    young = guard | {"measured": HORIZON - 1}
    assert judge(young, jnp.float32(1), jnp.float32(1e9), spike=20.0)[0]
    assert judge(new_guard(), jnp.float32(1), jnp.float32(0), spike=20.0)[1]["measured"] == 0
