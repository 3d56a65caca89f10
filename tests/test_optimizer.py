"""Schedule, decay groups and the update, against the paper's and the official code's formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from maejax.optimizer import decay_mask, make_optimizer, make_schedule


def test_schedule_of_the_paper():
    # ImageNet at batch 4096: 800 epochs, warm-up 40, peak 1.5e-4 * 16.
    steps_per_epoch = 312
    schedule = make_schedule(
        base_lr=1.5e-4, min_lr=0, batch_size=4096, warmup_steps=40 * steps_per_epoch, total_steps=800 * steps_per_epoch
    )

    def official(step):  # per iteration, in fractional epochs
        epoch = step / steps_per_epoch
        if epoch < 40:
            return 2.4e-3 * epoch / 40
        return 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / (800 - 40)))

    for step in (0, 1, 1000, 40 * 312 - 1, 40 * 312, 100_000, 249_000, 249_599):
        assert float(schedule(step)) == pytest.approx(official(step), rel=2e-4, abs=1e-9), step
    assert float(schedule(0)) == 0
    assert float(schedule(40 * 312)) == pytest.approx(2.4e-3)
    assert float(schedule(800 * 312)) == pytest.approx(0, abs=1e-9)


def test_schedule_without_warmup_and_with_a_floor():
    schedule = make_schedule(base_lr=1.0, min_lr=0.1, batch_size=256, warmup_steps=0, total_steps=10)
    assert float(schedule(0)) == 1
    assert float(schedule(5)) == pytest.approx(0.55)
    assert float(schedule(10)) == pytest.approx(0.1)


def test_decay_mask_by_name():
    params = {
        "encoder": {
            "cls_token": 0,
            "embed": {"kernel": 0, "bias": 0},
            "blocks": {"block": {"norm1": {"scale": 0, "bias": 0}, "attn": {"qkv": {"kernel": 0, "bias": 0}}}},
        },
        "decoder": {"mask_token": 0, "norm": {"scale": 0, "bias": 0}},
    }
    assert decay_mask(params) == {
        "encoder": {
            "cls_token": True,
            "embed": {"kernel": True, "bias": False},
            "blocks": {
                "block": {"norm1": {"scale": False, "bias": False}, "attn": {"qkv": {"kernel": True, "bias": False}}}
            },
        },
        "decoder": {"mask_token": True, "norm": {"scale": False, "bias": False}},
    }


def test_two_adamw_updates_by_hand():
    schedule = make_schedule(base_lr=0.1, min_lr=0.1, batch_size=256, warmup_steps=0, total_steps=10)
    tx = make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    state = tx.init(params)
    m = v = 0.0
    w = {"kernel": 2.0, "bias": 2.0}
    for t, g in enumerate((0.5, -1.0), start=1):
        updates, state = tx.update({"kernel": jnp.array([g]), "bias": jnp.array([g])}, state, params)
        params = {name: params[name] + updates[name] for name in params}
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        w = {"kernel": w["kernel"] - 0.1 * (step + 0.05 * w["kernel"]), "bias": w["bias"] - 0.1 * step}
        for name in w:
            np.testing.assert_allclose(params[name], [w[name]], rtol=1e-5)


def test_clipping_by_the_global_norm():
    tx = make_optimizer(lambda _: jnp.float32(1), b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1.0)
    params = {"kernel": jnp.zeros(2)}
    updates, _ = tx.update({"kernel": jnp.array([3.0, 4.0])}, tx.init(params), params)
    # Clipped to (0.6, 0.8); with no memory AdamW divides by |g| + 1.
    np.testing.assert_allclose(updates["kernel"], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-5)
