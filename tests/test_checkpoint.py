"""Checkpoints: exact, sealed, and never trusted without proof."""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maejax import faults
from maejax.checkpoint import Checkpoints
from maejax.errors import Diverged, NoValidCheckpoint, StorageFailed, UsageError
from maejax.manifest import MANIFEST, CorruptCheckpoint, digests, sealed_steps, verify
from maejax.mesh import AXES
from maejax.models import Decoder, ViT
from maejax.objectives.mae import MaskedAutoencoder
from maejax.optimizer import make_optimizer, make_schedule
from maejax.sharding import PRESETS, with_shardings
from maejax.state import init_state, state_shardings
from maejax.stored import load_weights, newest_verified
from maejax.tree import map_named, named_leaves

SCHEDULE = make_schedule(base_lr=1e-2, min_lr=0, batch_size=8, warmup_steps=2, total_steps=10)
TX = make_optimizer(SCHEDULE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=None)


@functools.cache
def initial(ema=False):
    objective = MaskedAutoencoder(
        ViT(patch=(4, 4), width=16, depth=2, heads=2), Decoder(pixels=48, width=16, depth=1, heads=2)
    )
    order = np.arange(16, dtype=np.int32)[None]
    batch = {"image": np.zeros((1, 16, 16, 3), np.uint8), "visible": order[:, :4], "masked": order[:, 4:]}
    return jax.jit(functools.partial(init_state, objective, TX, batch, seed=0, ema=ema))


@jax.jit
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
def fault(monkeypatch):
    """Sets faults for this process."""
    monkeypatch.setattr(faults, "_passages", Counter())
    monkeypatch.setattr(faults, "_wanted", [])

    def wanted(text):
        faults._wanted[:] = [tuple(text.split(":"))] if text else []

    return wanted


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
    """Fifty of fifty: in every file of the newest checkpoint in turn, at a place drawn at random."""
    saved(store, 1, 2)
    folder, aside = store.folder / "2", store.folder / "rejected-2"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    rng = random.Random(0)
    for trial in range(50):
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
    assert len(said) == 50 and store.newest()[0] == 2


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damages(folder, other):
    """Every truncation, deletion and swap of a checkpoint's files with those of another: what to do, by name."""

    def swap(name):
        mine, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
        (folder / name).write_bytes(theirs)
        (other / name).write_bytes(mine)

    def write(name, length):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] if length == "half" else content[: int(length)])

    found = {"one more file": lambda: (folder / "extra").write_text("x")}
    for name in files_below(folder):
        for length in ("0", "half", "-1") if (folder / name).stat().st_size else ():
            found[f"{name} to {length}"] = functools.partial(write, name, length)
        found[f"{name} deleted"] = (folder / name).unlink
        if (other / name).exists() and (other / name).read_bytes() != (folder / name).read_bytes():
            found[f"{name} swapped"] = functools.partial(swap, name)
    return found


def test_every_truncation_deletion_and_swap_is_found(store, tmp_path):
    saved(store, 1, 2)
    shutil.copytree(store.folder, tmp_path / "good")
    found = damages(store.folder / "2", store.folder / "1")
    assert len(found) > 40 and f"{MANIFEST} swapped" in found
    for do in found.values():
        do()
        with pytest.raises(CorruptCheckpoint):
            verify(store.folder / "2")
        for step in ("1", "2"):
            shutil.rmtree(store.folder / step)
            shutil.copytree(tmp_path / "good" / step, store.folder / step)
    verify(store.folder / "2")


def test_a_whole_checkpoint_in_the_place_of_another_is_found(store, said):
    saved(store, 1, 2)
    for source, target in (("1", "x"), ("2", "1"), ("x", "2")):
        (store.folder / source).rename(store.folder / target)
    with pytest.raises(NoValidCheckpoint):
        store.newest()
    assert [line.split(": ")[1].split(";")[0] for line in said] == [
        "manifest.json is that of step 1", "manifest.json is that of step 2",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_refused(store, kind):
    saved(store, 1, 2)
    victim = store.folder / "2" / "_METADATA"
    victim.rename(copy := store.folder.parent / "elsewhere")
    victim.symlink_to(copy) if kind == "link" else os.mkfifo(victim)
    with pytest.raises(CorruptCheckpoint, match="_METADATA is a link or another thing"):
        verify(store.folder / "2")
    assert store.newest()[0] == 1 and copy.exists()


@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_without_any_intact_checkpoint_the_run_does_not_begin_again(store, tmp_path, said, damage):
    saved(store, 1, 2)
    for step in ("1", "2"):
        manifest = store.folder / step / MANIFEST
        manifest.write_text("{}") if damage == "changed" else manifest.unlink()
    for _ in range(2):  # nor at the second attempt
        again = Checkpoints(store.folder, keep=2, say=said.append)
        with pytest.raises(NoValidCheckpoint, match="none of the checkpoints"):
            again.newest()
        again.close()
    assert sorted(path.name for path in store.folder.glob("rejected-*")) == ["rejected-1", "rejected-2"]


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_passed_over(store, said, fault):
    saved(store, 1, 2)
    (store.folder / "2" / "_METADATA").unlink()
    fault("reject:*:*:raise=EACCES")
    assert store.newest()[0] == 1 and "cannot be set aside (Permission denied" in said[-1]


def test_a_new_folder_has_none(store):
    assert store.newest() is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path, said):
    for name in ("7", "8.orbax-checkpoint-tmp", "deleted-6", "debug-5.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "deleted-6" / MANIFEST).touch()
    store = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    assert list(store.folder.iterdir()) == [] and store.newest() is None
    store.close()


def snapshot(folder):
    return {path: (folder / path).read_bytes() for path in files_below(folder)}


SAVING = (
    "save.prepare", "save.copy", "save.copied", "save.write", "save.commit", "save.committed", "seal.hash",
    "seal.draft", "seal.sync", "seal.rename",
)  # fmt: skip


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES", "EIO", "EFBIG"])
def test_a_failing_disk_is_told_once_and_stops_the_run_the_second_time(store, said, fault, number):
    state = saved(store, 1)
    before = snapshot(store.folder)
    for point in random.Random(number).sample(SAVING, 3):
        fault(f"{point}:*:*:raise={number}")
        store.save(numbered(state, 2), {})
        store.wait()
        assert (
            said[-1].startswith("warning: a checkpoint could not be written (")
            and os.strerror(getattr(errno, number)) in said[-1]
        )
        assert snapshot(store.folder) == before  # the older one untouched, no space taken
        fault("")
        store.save(numbered(state, 2), {})  # the disk works again
        store.wait()
        assert store.newest()[0] == 2
        shutil.rmtree(store.folder / "2")
        assert store.newest()[0] == 1 and snapshot(store.folder) == before
        store.restore(1, shapes_like(state))
    fault(f"save.write:*:*:raise={number}")
    with pytest.raises(StorageFailed, match="two checkpoints in a row"):
        for step in (3, 4):
            store.save(numbered(state, step), {})
            store.wait()
    assert snapshot(store.folder) == before


def test_a_failure_in_the_background_is_known_at_the_next_step(store, said, fault):
    state = saved(store, 1)
    fault("save.write:*:*:raise=EIO")
    store.save(numbered(state, 2), {})
    deadline = time.monotonic() + 20
    while not store.failing() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.failing() and not said
    fault("")
    assert store.wait() and not store.failing() and "Input/output error" in said[0]


def test_slow_storage_delays_no_step_for_long_and_queues_no_second_save(store, said, fault, monkeypatch):
    monkeypatch.setattr("maejax.checkpoint.PATIENCE", 0.2)
    state = saved(store, 1)
    fault("save.write:*:*:sleep=2")
    store.save(numbered(state, 2), {})
    start = time.monotonic()
    store.save(numbered(state, 3), {})
    assert 0.1 < time.monotonic() - start < 1.5
    assert said == ["warning: storage is slow, the last checkpoint is still being written; none of step 3"]
    store.save(numbered(state, 4), {}, wait=True)  # the last one is never left out
    store.wait()
    assert sealed_steps(store.folder) == [2, 4]


def test_an_old_checkpoint_that_cannot_be_deleted_fails_no_save(store, said, fault):
    state = saved(store, 1, 2)
    fault("retain:*:*:raise=EIO")
    store.save(numbered(state, 3), {})
    store.wait()
    assert said == ["warning: checkpoint 1 could not be deleted (Input/output error: retain)"]
    assert store.newest()[0] == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_kept_for_study_and_never_resumed_from(store, value):
    """In the moments, where no loss shows it yet."""
    state = numbered(saved(store, 1), 2)
    moments = jax.tree.leaves(state.opt_state)
    at = next(i for i, x in enumerate(moments) if x.ndim == 2)
    moments[at] = moments[at].at[0, -1].set(value)
    bad = dataclasses.replace(state, opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), moments))
    with pytest.raises(Diverged, match=r"opt_state/.* is not finite at step 2 \(1 arrays are not\); kept as .*debug-2"):
        store.save(bad, {})
    assert store.newest()[0] == 1 and sealed_steps(store.folder) == [1]
    assert "not finite" in (store.folder / "debug-2" / "reason.txt").read_text()
    again = Checkpoints(store.folder, keep=2, say=print)  # a new start leaves it there
    again.close()
    kept = store._orbax.restore(store.folder / "debug-2")
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


def mutations(shapes):
    """Trees that a checkpoint does not hold, each with the name that the error must have."""

    def leaf(path, change):
        found = []

        def replace(name, x):
            if name == path:
                found.append(name)
                return change(x)
            return x

        tree = map_named(replace, shapes)
        assert found, path
        return tree

    def wider(x):
        return jax.ShapeDtypeStruct((*x.shape, 2), x.dtype, sharding=x.sharding)

    def half(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)

    names = [name for name in named_leaves(shapes) if name.endswith(("cls_token", "fc1/kernel"))]
    assert len(names) >= 6 and {name.partition("/")[0] for name in names} == {"params", "opt_state"}
    for name in names[:4] + names[-1:]:
        yield name, "has shape", leaf(name, wider)
        yield name, "is float32, expected bfloat16", leaf(name, half)
    more = dataclasses.replace(shapes, params=shapes.params | {"head": shapes.step})
    yield "params/head", "is missing", more
    less = {name: tree for name, tree in shapes.params.items() if name != "decoder"}
    yield "params/decoder/", "has no place in this run", dataclasses.replace(shapes, params=less)
    yield "ema/", "is missing", dataclasses.replace(shapes, ema=shapes.params)


def test_another_tree_shape_or_type_is_refused_by_name(store):
    state = saved(store, 1)
    tried = list(mutations(shapes_like(state)))
    assert len(tried) >= 12
    for name, problem, shapes in tried:
        with pytest.raises(UsageError) as refused:
            store.restore(1, shapes)
        assert str(store.folder / "1") in str(refused.value) and problem in str(refused.value), name
        assert f": {name}" in str(refused.value) and "\n" not in str(refused.value)
    equal(store.restore(1, shapes_like(state)), numbered(state, 1))


def test_a_newer_format_is_refused_and_not_set_aside(store):
    saved(store, 1)
    manifest = store.folder / "1" / MANIFEST
    body = manifest.read_text().rpartition("}")[0] + "}"
    newer = body.replace('"format": 2', '"format": 3').encode()
    manifest.write_bytes(newer + b"\n" + hashlib.sha256(newer).hexdigest().encode() + b"\n")
    with pytest.raises(UsageError, match=r"checkpoints/1 has checkpoint format 3; this maejax reads up to 2"):
        store.newest()
    assert (store.folder / "1").is_dir()


def test_format_1_which_hashed_large_files_whole_is_still_read(store):
    saved(store, 1)
    content = verify(store.folder / "1") | {"format": 1}
    body = json.dumps(content).encode()
    (store.folder / "1" / MANIFEST).write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    assert store.newest()[0] == 1
    flip_a_bit(store.folder / "1" / "_METADATA", random.Random(0))
    with pytest.raises(CorruptCheckpoint, match="_METADATA was changed"):
        verify(store.folder / "1")


def test_digests_are_those_of_the_standard_library(tmp_path):
    small, large = np.random.default_rng(0).bytes(1000), np.random.default_rng(1).bytes(7 << 20)
    for name, content in (("small", small), ("large", large), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    chunks = [hashlib.sha256(large[start : start + (3 << 20)]).digest() for start in range(0, 7 << 20, 3 << 20)]
    assert digests(tmp_path, ["small", "large", "empty"], chunk=3 << 20) == {
        "small": hashlib.sha256(small).hexdigest(),
        "large": hashlib.sha256(b"".join(chunks)).hexdigest(),
        "empty": hashlib.sha256(b"").hexdigest(),
    }


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
