"""Checkpoints: exact, sealed, and never trusted without proof."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maejax.checkpoint import (
    MANIFEST,
    Checkpoints,
    CorruptCheckpoint,
    load_weights,
    newest_verified,
    sealed_steps,
    verify,
)
from maejax.errors import NoValidCheckpoint, StorageFailed, UsageError
from maejax.mesh import AXES
from maejax.models import Decoder, ViT
from maejax.objectives.mae import MaskedAutoencoder
from maejax.optimizer import make_optimizer, make_schedule
from maejax.sharding import PRESETS, with_shardings
from maejax.state import init_state, state_shardings

SCHEDULE = make_schedule(base_lr=1e-2, min_lr=0, batch_size=8, warmup_steps=2, total_steps=10)
TX = make_optimizer(SCHEDULE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None)


def initial(ema=False):
    objective = MaskedAutoencoder(
        ViT(patch=(4, 4), width=16, depth=2, heads=2), Decoder(pixels=48, width=16, depth=1, heads=2)
    )
    order = np.arange(16, dtype=np.int32)[None]
    batch = {"image": np.zeros((1, 16, 16, 3), np.uint8), "visible": order[:, :4], "masked": order[:, 4:]}
    return jax.jit(functools.partial(init_state, objective, TX, batch, seed=0, ema=ema))


def numbered(state, step):
    """The state of a step, different for each."""
    return jax.tree.map(lambda x: x + step if x.dtype != jnp.int32 else x * 0 + step, state)


def shapes_like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    made = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    yield made
    made.close()


def saved(store, *steps, ema=False):
    state = initial(ema)()
    for step in steps:
        store.save(numbered(state, step), {"data": "id", "bad_images": {"empty": step}})
    store.wait()
    return state


def test_what_is_restored_is_what_was_saved(store):
    state = saved(store, 3, ema=True)
    assert store.newest() == (3, {"data": "id", "bad_images": {"empty": 3}})
    equal(store.restore(3, shapes_like(state)), numbered(state, 3))


def test_a_checkpoint_from_before_the_guard_is_restored(store, monkeypatch):
    state = initial()()
    old = dataclasses.replace(numbered(state, 3), guard={})
    with monkeypatch.context() as patch:
        fields = ("step", "params", "opt_state", "ema", "stats")
        patch.setattr("maejax.checkpoint._as_dict", lambda state: {name: getattr(state, name) for name in fields})
        store.save(old, {"data": "id", "bad_images": {}})
        store.wait()
    restored = store.restore(3, shapes_like(state))
    equal(dataclasses.replace(restored, guard={}), old)
    assert {name: float(value) for name, value in restored.guard.items()} == dict.fromkeys(state.guard, 0.0)


def test_a_donated_state_may_be_overwritten_while_it_is_written(store):
    state = initial()()
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    store.save(state, {})
    state = jax.block_until_ready(overwrite(state))
    store.wait()
    equal(store.restore(0, shapes_like(state)), expected)


def test_only_the_newest_are_kept(store):
    saved(store, 1, 2, 3, 4)
    assert sealed_steps(store.folder) == [3, 4]


def test_a_state_is_restored_onto_another_mesh(store):
    state = saved(store, 5)
    devices = np.array(jax.devices()[:8]).reshape(1, 2, 4, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
    target = with_shardings(state, state_shardings(state, PRESETS["fsdp"], mesh))
    restored = store.restore(5, target)
    equal(restored, numbered(state, 5))
    kernel = restored.params["encoder"]["blocks"]["block"]["mlp"]["fc1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and not kernel.sharding.is_fully_replicated


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_reported_and_the_one_before_is_used(store, said):
    """Twenty of twenty: in every file of the newest checkpoint in turn, at a place drawn at random."""
    saved(store, 1, 2)
    folder, aside = store.folder / "2", store.folder / "rejected-2"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    rng = random.Random(0)
    for trial in range(20):
        path = files[trial % len(files)]
        original = path.read_bytes()
        flip_a_bit(path, rng)
        with pytest.raises(CorruptCheckpoint, match=path.name):
            verify(folder)
        assert store.newest()[0] == 1
        assert "checkpoint 2 is damaged" in said[-1] and path.name in said[-1] and "rejected-2" in said[-1]
        assert path.name in (aside / "reason.txt").read_text() and sealed_steps(store.folder) == [1]
        aside.rename(folder)  # mended, for the next trial
        (folder / "reason.txt").unlink()
        path.write_bytes(original)
    assert len(said) == 20 and store.newest()[0] == 2


@pytest.mark.parametrize("damage", ["truncated", "deleted", "added", "no manifest"])
def test_other_damage(store, damage):
    saved(store, 1, 2)
    folder = store.folder / "2"
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "deleted":
        victim.unlink()
    elif damage == "added":
        (folder / "extra").write_text("x")
    else:
        (folder / MANIFEST).unlink()
    assert store.newest()[0] == 1


def test_without_any_intact_checkpoint_the_run_does_not_begin_again(store):
    saved(store, 1)
    (store.folder / "1" / MANIFEST).write_text("{}")
    with pytest.raises(NoValidCheckpoint, match="none of the checkpoints"):
        store.newest()
    with pytest.raises(NoValidCheckpoint):  # nor at the second attempt
        store.newest()


def test_a_new_folder_has_none(store):
    assert store.newest() is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path, said):
    for name in ("7", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    store = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    assert list(store.folder.iterdir()) == [] and store.newest() is None
    store.close()


def test_a_failing_disk_is_told_once_and_stops_the_run_the_second_time(tmp_path, said, monkeypatch):
    store = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    state = saved(store, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maejax.checkpoint.write_manifest", full)
    store.save(numbered(state, 2), {})
    store.wait()
    assert "could not be written" in said[0] and "No space left" in said[0]
    assert sealed_steps(store.folder) == [1]
    store.save(numbered(state, 3), {})
    with pytest.raises(StorageFailed, match="two checkpoints in a row"):
        store.wait()
    store.close()


def test_weights_alone(tmp_path, said):
    run = tmp_path / "run"
    store = Checkpoints(run / "checkpoints", keep=2, say=said.append)
    state = saved(store, 4)
    store.close()
    checkpoint = newest_verified(run)
    equal(load_weights(checkpoint, shapes_like(state.params)), numbered(state, 4).params)
    encoder = {"encoder": shapes_like(state.params["encoder"])}
    equal(load_weights(checkpoint, encoder)["encoder"], numbered(state, 4).params["encoder"])
    other = shapes_like(state.params)
    other["encoder"]["cls_token"] = jax.ShapeDtypeStruct((1, 1, 99), jnp.float32)
    with pytest.raises(UsageError, match=r"encoder/cls_token has shape \(1, 1, 16\), expected shape \(1, 1, 99\)"):
        load_weights(checkpoint, other)
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        newest_verified(tmp_path)


def test_the_average_is_preferred(tmp_path, said):
    run = tmp_path / "run"
    store = Checkpoints(run / "checkpoints", keep=2, say=said.append)
    state = initial(ema=True)()
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 7, state.params))
    store.save(state, {})
    store.close()
    equal(load_weights(newest_verified(run), shapes_like(state.params)), state.ema)


def test_the_manifest_is_readable_json_and_a_seal(store):
    saved(store, 1)
    text = (store.folder / "1" / MANIFEST).read_text()
    body, seal = text.rstrip("\n").rsplit("\n", 1)
    content = json.loads(body)
    assert content["step"] == 1 and len(seal) == 64
    assert all(len(digest) == 64 for digest in content["files"].values())
