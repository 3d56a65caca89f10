"""`maejax finetune` as a user meets it: from a run, from scratch, a part, a probe; stopped, resumed, and mistakes."""

import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

import maejax
from maejax import build, runs
from maejax.cli import main
from maejax.evaluate import Evaluator
from maejax.mesh import AXES
from maejax.overrides import override
from maejax.tree import named_leaves

SMALL = ("--config.log_steps=2", "--config.tensorboard=false", "--config.save_steps=4", "--config.batch_size=32")
PRETRAIN = (
    "--config=pretrain_digits", "--config.model.width=32", "--config.model.depth=2", "--config.decoder.width=16",
    "--config.steps=4", "--config.warmup_steps=0", "--config.evals=none",
)  # fmt: skip
FINETUNE = ("--config.steps=8", "--config.warmup_steps=2", "--config.eval_steps=4")
PROBE = (
    "--config=probe_vit_b16_imagenet", "--config.data.source=digits", "--config.data.eval_split=test",
    "--config.image_size=16", "--config.dtype=float32", "--config.data.crop_scale=0.6,1", "--config.data.flip=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    run = tmp_path_factory.mktemp("finetune") / "run"
    assert main(["pretrain", *PRETRAIN, *SMALL, f"--workdir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def finetuned(pretrained):
    workdir = pretrained.parent / "ft"
    assert main(["finetune", f"--from={pretrained}", *SMALL, *FINETUNE, f"--workdir={workdir}"]) == 0
    return workdir


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(workdir):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(runs.load_objective(workdir)[2]).items()}


def test_without_a_recipe_the_runs_images_and_the_papers_augmentations(finetuned, pretrained):
    c = runs.config_of_run(finetuned)
    assert c.data.source == "digits" and c.finetune.num_classes == 10 and c.model.width == 32
    assert (c.optimizer.layer_decay, c.finetune.mixup, c.data.rand_augment) == (0.75, 0.8, 9.0)
    log = (finetuned / "train.log").read_text()
    assert "starting from the weights of" in log and "new: encoder/pos_embed, fc_norm, head" in log
    assert "classes   10, from mean features; trained: everything" in log and "top1 " in log
    record = json.loads((finetuned / "evals" / "accuracy_8.json").read_text())
    assert record["images"] == {"test": 359} and record["metrics"].keys() == {"top1", "top5", "loss"}
    lines = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/top1" in line] == [4, 8]


def test_the_encoder_of_a_classifier_gives_features(finetuned):
    encoder, params = maejax.load_encoder(finetuned)
    assert encoder.apply({"params": params}, np.zeros((2, 16, 16, 1), np.uint8)).shape == (2, 17, 32)


def test_an_interrupted_fine_tuning_goes_on_exactly(pretrained, finetuned, tmp_path, capsys):
    """Stopped by a signal during the fifth step: everything random goes on as if nothing had happened."""
    import os
    import signal

    from maejax import hooks

    workdir = tmp_path / "ft"
    arguments = ["finetune", f"--from={pretrained}", *SMALL, *FINETUNE, f"--workdir={workdir}"]
    plain = hooks.ListBadImages.__call__

    def interrupt(self, end):
        plain(self, end)
        if end.step == 4:  # the news of step 5 have it
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.ListBadImages, "__call__", interrupt)
        assert main(arguments) == 75
    assert main(arguments) == 0
    # Step 5, unless the evaluation after step 4 was still to come, which is left and done later.
    assert re.search("resuming at step [45]\\b", capsys.readouterr().out)
    assert losses(workdir)[-2:] == losses(finetuned)[-2:]
    left, right = weights(workdir), weights(finetuned)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_the_linear_probe_is_the_same_loop(pretrained, tmp_path, capsys):
    workdir = tmp_path / "probe"
    flags = [*PROBE, *SMALL, "--config.steps=200", "--config.warmup_steps=10", "--config.base_lr=6.4"]
    flags += ["--config.log_steps=50", "--config.save_steps=200", "--config.batch_size=256"]
    assert main(["finetune", f"--from={pretrained}", *flags, f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "10, from cls features; trained: head" in out and "new: head" in out
    before, after = weights(pretrained), weights(workdir)
    for name in after:
        if not name.startswith("head/"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    # The running statistics are part of the run: without them the probe would be blind.
    assert main(["evaluate", str(workdir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["top1"] > 0.3  # of a tiny encoder that has seen four steps; chance is 0.1
    assert result["top1"] == json.loads((workdir / "evals/accuracy_200.json").read_text())["metrics"]["top1"]


def test_partial_fine_tuning_and_from_scratch(pretrained, tmp_path, capsys):
    half = ["--config.finetune.blocks=1", "--config.steps=2", "--config.warmup_steps=0"]
    assert main(["finetune", f"--from={pretrained}", *SMALL, *half, f"--workdir={tmp_path / 'half'}"]) == 0
    assert "trained: the last 1 of 2 blocks" in capsys.readouterr().out
    before, after = weights(pretrained), weights(tmp_path / "half")
    name = "encoder/blocks/block/mlp/fc1/kernel"
    np.testing.assert_array_equal(before[name][0], after[name][0])
    assert (before[name][1] != after[name][1]).any()

    scratch = [*PROBE, "--config=scratch_vit_b16_imagenet", *SMALL, "--config.model.width=32", "--config.model.depth=2"]
    scratch += [
        "--config.model.heads=4",
        "--config.model.patch=4",
        "--config.data.channels=1",
        "--config.data.mean=0.3",
    ]
    scratch += ["--config.data.std=0.4", "--config.steps=2", "--config.warmup_steps=0"]
    assert main(["finetune", *scratch, f"--workdir={tmp_path / 'scratch'}"]) == 0
    assert "starting from" not in capsys.readouterr().out


@pytest.mark.parametrize("devices", [1, 8])
def test_accuracy_is_the_same_on_any_devices(finetuned, devices):
    c, objective, variables = runs.load_variables(finetuned)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1), AXES)
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    got = Evaluator(c, ["accuracy"])(objective, everywhere, mesh)["accuracy"]
    source = build.source_of(c, evaluation=True)
    (batch,) = build.ordered_batches(c, source, batch_size=359)  # all images as one batch, nothing padded
    logits = np.asarray(objective.apply(variables, batch["image"], method="logits"))
    assert got["top1"] == (logits.argmax(-1) == batch["label"]).mean()


def test_a_head_for_other_classes_is_refused_or_starts_anew(finetuned, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "images" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(
            tmp_path / f"images/{'abc'[i % 3]}/{i}.png"
        )
    command = ["finetune", str(tmp_path / "images"), f"--from={finetuned}", *SMALL, "--config.steps=1"]
    command += ["--config.warmup_steps=0", "--config.evals=none", f"--workdir={tmp_path / 'ft'}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "is for 10 classes, the images have 3; --adapt starts a new head" in error and error.count("\n") == 1
    assert main([*command, "--adapt"]) == 0
    assert weights(tmp_path / "ft")["head/kernel"].shape == (32, 3)


def test_weights_are_adapted_when_asked_to(pretrained, tmp_path, capsys):
    flags = [*PROBE, *SMALL, "--config.model.patch=8", "--config.data.channels=3", "--config.data.mean=0.3"]
    flags += ["--config.data.std=0.4", "--config.image_size=32,48", "--config.model.positions=learned"]
    flags += ["--config.finetune.pool=mean", "--config.finetune.batch_norm=false", "--config.base_lr=0"]
    flags += ["--config.steps=1", "--config.warmup_steps=0", "--config.evals=none", f"--workdir={tmp_path / 'ft'}"]
    assert main(["finetune", f"--from={pretrained}", "--adapt", *flags]) == 0
    assert "adapted: encoder/embed/kernel, encoder/pos_embed" in capsys.readouterr().out
    old, new = weights(pretrained), weights(tmp_path / "ft")
    assert new["encoder/embed/kernel"].shape == (8 * 8 * 3, 32) and new["encoder/pos_embed"].shape == (1, 25, 32)
    np.testing.assert_array_equal(
        old["encoder/blocks/block/mlp/fc1/kernel"], new["encoder/blocks/block/mlp/fc1/kernel"]
    )
    # A grey patch, doubled in size, gives the token that it gave before.
    patch = np.repeat(np.arange(4.0)[:, None], 4, 1)
    doubled = np.asarray(Image.fromarray(patch.astype(np.float32)).resize((8, 8), Image.Resampling.BICUBIC))
    before = patch.reshape(-1) @ old["encoder/embed/kernel"]
    after = np.repeat(doubled.reshape(-1), 3) @ new["encoder/embed/kernel"]
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_a_classifier_starts_no_decoder(finetuned, tmp_path, capsys):
    flags = [*PRETRAIN, *SMALL, f"--workdir={tmp_path / 'run'}", f"--from={finetuned}"]
    assert main(["pretrain", *flags]) == 2
    error = capsys.readouterr().err
    assert ("pos_embed" in error or "decoder" in error) and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--config.image_size=24"],
            "was trained with image_size=16, this config has 24; --adapt (of maejax",
        ),
        (
            ["--config.data.channels=3", "--config.data.mean=0.5", "--config.data.std=0.5"],
            "data.channels=1, this config",
        ),
        (["--config.finetune.blocks=3"], "finetune.blocks=3 is more than the encoder's 2 blocks"),
        (["--config.finetune.pool=max"], "finetune.pool='max' is not one of mean, cls"),
        (["--config.finetune.num_classes=7"], "finetune.num_classes=7, but digits has 10 classes"),
        (["--config.optimizer.layer_decay=0"], "optimizer.layer_decay=0.0 must be more than 0 and at most 1"),
        (["--config.model.drop_path=1"], "model.drop_path=1.0 must lie between 0 and 1, below 1"),
        (["--config.data.eval_split=nosuch"], "digits has no split 'nosuch'"),
        (["finetune.blocks=2"], "would be ignored; write --config.finetune.blocks=2"),
        (["--config=pretrain_digits"], "is a recipe for objective=mae"),
        (["--from=/nosuch"], "is not a run of maejax"),
    ],
)
def test_mistakes_are_one_line(pretrained, tmp_path, capsys, flags, says):
    start = [] if any(flag.startswith("--from") for flag in flags) else [f"--from={pretrained}"]
    assert main(["finetune", *start, *SMALL, f"--workdir={tmp_path / 'ft'}", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert not (tmp_path / "ft").exists()


def test_images_without_labels_and_accuracy_without_a_classifier(pretrained, tmp_path, capsys):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "x.png")
    assert main(["finetune", str(tmp_path), f"--from={pretrained}", f"--workdir={tmp_path / 'ft'}"]) == 2
    assert "has no labels; a folder needs a subfolder for each of its classes" in capsys.readouterr().err
    assert main(["evaluate", str(pretrained), "--with=accuracy"]) == 2
    assert "evals=accuracy needs a classifier" in capsys.readouterr().err
    assert main(["finetune"]) == 2
    assert "say what to start from" in capsys.readouterr().err


def test_a_config_of_the_paper():
    from maejax import config as configs

    c = configs.load("finetune_vit_l16_imagenet")
    assert (c.base_lr, c.optimizer.layer_decay, c.model.drop_path, c.batch_size) == (1e-3, 0.75, 0.2, 1024)
    probe = override(configs.load("probe_vit_b16_imagenet"), {})
    assert probe.base_lr * probe.batch_size / 256 == pytest.approx(6.4) and probe.optimizer.name == "lars"
