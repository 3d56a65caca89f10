"""The command line as users meet it: folders, mistakes, pictures. Mistakes cost one line and no device."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from mutations import problem, run_all
from PIL import Image

import maejax
from maejax import config as configs
from maejax.cli import main
from maejax.commands.arguments import split_config_flags
from maejax.errors import UsageError
from maejax.mesh import AXES, make_mesh

SMALL = (
    "--config.model.width=32", "--config.model.heads=4", "--config.model.depth=1", "--config.decoder.width=16",
    "--config.decoder.depth=1", "--config.decoder.heads=4", "--config.tensorboard=false",
)  # fmt: skip


def make_photos(folder: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("deep/er" if i % 2 else ".") / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (40 + i, 36)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on a folder of photos, one of them broken."""
    place = tmp_path_factory.mktemp("cli")
    photos = make_photos(place / "photos")
    (photos / "broken.jpg").write_bytes((photos / "deep/er/01.jpg").read_bytes()[:200])
    workdir = place / "run"
    code = main(
        ["pretrain", str(photos), f"--workdir={workdir}", *SMALL, "--config.steps=9", "--config.batch_size=8",
         "--config.log_steps=2", "--config.save_steps=4"]
    )  # fmt: skip
    assert code == 0
    return workdir


def test_a_folder_of_photos_is_all_it_needs(run):
    log = (run / "train.log").read_text()
    for text in (
        "found 13 images (", "unreadable: 1 (1 truncated): broken.jpg", "chose images of 32x32 in patches of 4x4",
        "batch     8 = 1 processes x 8 devices x 1 per device x 1 accumulation", "lr        4.69e-06 = base_lr",
        "step 9/9 100%", "done      ",
    ):  # fmt: skip
        assert text in log, text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/img_per_sec", "perf/img_per_sec_per_device",
            "perf/step_time", "perf/data_wait", "progress/epoch", "progress/examples"} <= lines[-1].keys()  # fmt: skip
    assert lines[-1]["progress/examples"] == 72 and lines[-1]["data/bad_truncated"] >= 5
    bad = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    assert {(line["name"], line["cause"]) for line in bad} == {("broken.jpg", "truncated")}
    assert len(bad) == lines[-1]["data/bad_truncated"]
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [4, 8, 9]
    assert (run / "pictures" / "reconstruction_9.png").exists() and (run / "env.json").exists()
    assert json.loads((run / "config.json").read_text())["total_steps"] == 9


def test_encoder_features_from_python(run):
    encoder, params = maejax.load_encoder(run)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    tokens = encoder.apply({"params": params}, images)
    assert tokens.shape == (2, 1 + 64, 32)
    here = os.path.relpath(run)
    np.testing.assert_array_equal(params["cls_token"], maejax.load_encoder(here)[1]["cls_token"])
    np.testing.assert_array_equal(tokens, encoder.apply({"params": params}, images))
    with pytest.raises(UsageError, match="is not a run of maejax"):
        maejax.load_encoder(run / "checkpoints")


def test_pictures_of_a_run_and_of_ones_own_images(run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["reconstruct", str(run), f"--out={out}"]) == 0
    with Image.open(out) as picture:
        assert picture.width > 400
    photo = next((run.parent / "photos").rglob("*.png"))
    assert main(["reconstruct", str(run), str(photo), f"--out={out}", "--mask-ratio=0.5", "--sampler=grid"]) == 0
    assert "picture of 1 images" in capsys.readouterr().out


def test_evaluations_of_a_run_while_it_trains_and_after(tmp_path, capsys, monkeypatch):
    flags = ["--config=pretrain_digits", *SMALL, "--config.steps=4", "--config.warmup_steps=0"]
    flags += ["--config.evals=knn,rankme", "--config.eval_steps=2", "--config.eval_images=100"]
    assert main(["pretrain", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "step 2  knn_top1 " in out and "with the same encoder untrained (digits, test)" in out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/knn_top1" in line] == [2, 4]
    result = json.loads((tmp_path / "run/evals/knn_4.json").read_text())
    assert result["images"] == {"train": 100, "test": 100} and result["seed"] == 0
    assert result["metrics"].keys() == {"knn_top1"}
    assert result["config"]["data"]["source"] == "digits" and len(result["data_ids"]) == 2

    # Afterwards on all images, the same on one device as on all eight.
    found = []
    for devices in (1, 8):
        mesh = make_mesh({"dcn_data": 1, "data": -1, "fsdp": 1, "tensor": 1}) if devices == 8 else mesh_of_one()
        monkeypatch.setattr("maejax.runs.make_mesh", lambda _, mesh=mesh: mesh)
        assert main(["evaluate", str(tmp_path / "run"), "--with=knn,linear", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["knn_top1"] == found[1]["knn_top1"] and found[0]["linear_top1"] == found[1]["linear_top1"]
    own = (tmp_path / "run/evals/knn_4.json").read_text()
    assert json.loads(own)["images"] == {"train": 1438, "test": 359}

    # Of other images, beside the run's own.
    evaluate = ["evaluate", str(tmp_path / "run"), "--with=knn"]
    assert main([*evaluate, "--config.data.split=test", "--config.data.eval_split=train"]) == 0
    assert (tmp_path / "run/evals/knn_4.json").read_text() == own
    other = json.loads((tmp_path / "run/evals/on-digits-train/knn_4.json").read_text())
    assert other["images"] == {"train": 359, "test": 1438}


def test_a_start_with_other_images_is_refused_and_leaves_the_run_as_it_was(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    photo = next((run.parent / "photos").rglob("*.png"))
    (tmp_path / "others").mkdir()
    shutil.copy(photo, tmp_path / "others" / "one.png")
    assert main(["pretrain", str(tmp_path / "others"), f"--workdir={folder}"]) == 2
    assert "the images are not those that" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def mesh_of_one():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)


def test_warm_start_from_another_run(run, tmp_path, capfd):
    flags = [*SMALL, "--config.steps=1", "--config.batch_size=8", "--config.base_lr=0"]
    assert (
        main(["pretrain", str(run.parent / "photos"), f"--workdir={tmp_path / 'next'}", f"--from={run}", *flags]) == 0
    )
    assert "starting from the weights of" in capfd.readouterr().out
    (_, old), (_, new) = (maejax.load_encoder(where) for where in (run, tmp_path / "next"))
    np.testing.assert_array_equal(old["embed"]["kernel"], new["embed"]["kernel"])
    assert main(
        ["pretrain", str(run.parent / "photos"), f"--workdir={tmp_path / 'other'}", f"--from={run}", *flags,
         "--config.model.width=64"]
    ) == 2  # fmt: skip
    assert "expected shape" in capfd.readouterr().err


class MeanPixel(nn.Module):
    """An objective from outside the package: one number is fitted to the images' mean."""

    encoder: nn.Module
    decoder: nn.Module
    norm_pix: bool

    @nn.compact
    def __call__(self, batch):
        guess = self.param("guess", nn.initializers.zeros, ())
        mean = batch["image"].mean() / 255
        return jnp.square(guess - mean), {"mean": mean}


def test_an_objective_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--config=pretrain_digits", f"--config.objective={__name__}:MeanPixel", "--config.steps=30"]
    flags += ["--config.warmup_steps=1", "--config.base_lr=0.2", "--config.evals=none", "--config.log_steps=10"]
    assert main(["pretrain", *flags, "--workdir=run"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < 0.01 and 0.2 < lines[-1]["train/mean"] < 0.4


def test_a_changed_config_is_refused_with_the_difference(run, capsys):
    photos = str(run.parent / "photos")
    assert main(["pretrain", photos, f"--workdir={run}", "--config.mask.ratio=0.5"]) == 2
    error = capsys.readouterr().err
    assert "mask.ratio was 0.75, now 0.5" in error and f"--from={run}" in error and error.count("\n") == 1


def test_changed_images_are_refused(run, tmp_path, capsys):
    photos = run.parent / "photos"
    extra = photos / "extra.png"
    Image.new("RGB", (40, 40)).save(extra)
    try:
        assert main(["pretrain", str(photos), f"--workdir={run}"]) == 2
        assert "are not those that" in capsys.readouterr().err
    finally:
        extra.unlink()


def test_too_many_bad_images_stop_the_run_with_65(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 6)
    for i in range(6):
        (photos / f"broken{i}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    flags = [*SMALL, "--config.steps=500", "--config.batch_size=8", "--config.data.max_bad_fraction=0.01"]
    assert main(["pretrain", str(photos), f"--workdir={tmp_path / 'run'}", *flags]) == 65
    error = capsys.readouterr().err
    assert "data.max_bad_fraction=0.01" in error and "bad_images.jsonl lists them" in error


def test_divergence_stops_the_run_with_70_and_saves_nothing_of_it(tmp_path, capsys):
    flags = ["--config=pretrain_digits", "--config.model.width=32", "--config.model.depth=1", "--config.base_lr=1e30"]
    flags += ["--config.steps=40", "--config.save_steps=1", "--config.log_steps=1", "--config.warmup_steps=2"]
    flags += ["--config.keep_checkpoints=99", "--config.tensorboard=false", "--config.batch_size=16"]
    assert main(["pretrain", *flags, f"--workdir={tmp_path / 'run'}"]) == 70
    assert "the last checkpoint is intact" in capsys.readouterr().err
    encoder, params = maejax.load_encoder(tmp_path / "run")
    assert np.isfinite(params["embed"]["kernel"]).all()


def test_two_runs_cannot_share_a_folder(tmp_path, capsys):
    from maejax.workdir import lock

    held = lock(tmp_path / "run")
    assert main(["pretrain", "--config=pretrain_digits", f"--workdir={tmp_path / 'run'}", "--config.steps=1",
                 "--config.warmup_steps=0"]) == 2  # fmt: skip
    assert "another run is writing to" in capsys.readouterr().err
    held.close()


# ---- Mistakes: one line, exit 2, in five seconds, no device --------------------------------------------------------

DIGITS = ["pretrain", "--config=pretrain_digits"]
MISTAKES = [
    (["pretrain"], "say what to train on"),
    (["pretrain", "--config=pretrain_digits", "--process-id=1"], "--process-id=1 needs --coordinator and"),
    (["pretrain", "--config=pretrain_digits", "--fake-processes=0"], "--fake-processes=0 must lie between 1 and 64"),
    (["pretrain", "digits", "--fake-processes=2"], "several processes need --config=RECIPE"),
    (["pretrain", "--config=pretrain_digits", "--config.profile_steps=7"], "profile_steps='7' must be FIRST:LAST"),
    (["pretrain", "--config=pretrain_digits", "--config.profile_steps=9:7"], "ends before it begins"),
    (["pretain"], "unknown command 'pretain'; commands: pretrain"),
    (["pretrain", "nosuch/folder"], "does not exist"),
    (["pretrain", "empty"], "no image file in"),
    (["pretrain", "broken"], "none of the 1 image files can be"),
    (
        [*DIGITS, "--config.data.source=broken", "--config.evals=none"],
        "none of the 1 image files can be read",
    ),
    (["pretrain", "zip:x"], "unknown scheme 'zip'"),
    (["pretrain", "empty", "mask.ratio=0.5"], "write --config.mask.ratio=0.5"),
    (["pretrain", "mask.ratio=0.5"], "write --config.mask.ratio=0.5"),
    (["pretrain", "--config=nosuch.py"], "shipped recipes:"),
    ([*DIGITS, "--config.mask.raito=0.5"], "did you mean --config.mask.ratio?"),
    ([*DIGITS, "--config.batch_size=many"], "expected a whole number"),
    ([*DIGITS, "--config.mask.ratio=1.5"], "must lie between 0 and 1"),
    ([*DIGITS, "--config.image_size=17"], "is not divisible by the patch's 4"),
    ([*DIGITS, "--config.model.size=XXL"], "model.size='XXL' is not one of Ti, S, B, L, H"),
    ([*DIGITS, "--config.mask.sampler=rnd"], "is not one of random, block, grid"),
    ([*DIGITS, "--config.data.crop=centre"], "did you mean center?"),
    ([*DIGITS, "--config.sharding=zero3"], "did you mean zero1?"),
    ([*DIGITS, "--config.mesh.data=7"], "batch_size=128 is not divisible by mesh.data"),
    ([*DIGITS, "--config.mesh.tensor=3"], "mesh.tensor=3 must divide"),
    ([*DIGITS, "--config.data.eval_split=train"], "evaluations need two splits"),
    ([*DIGITS, "--config.data.split=nosuch"], "its splits are train, test"),
    ([*DIGITS, "--config.data.source=tfds:nosuch"], "is not prepared as ArrayRecord"),
    ([*DIGITS, "--config.objective=nosuch.module:Thing"], "cannot be imported"),
    ([*DIGITS, "--workdir=foreign"], "is not empty and not a run of maejax"),
    ([*DIGITS, "--workdir=/proc/nosuch/run"], "is not a folder that can be written to"),
    ([*DIGITS, "--wandb"], "needs the wandb package"),
    ([*DIGITS, "--from=empty"], "is not a run of maejax"),
    ([*DIGITS, "--no-such-flag"], "unknown argument '--no-such-flag'"),
    ([*DIGITS, "--config.mask.ratio"], "needs a value"),
    (["reconstruct", "empty"], "is not a run of maejax"),
    (["evaluate", "empty"], "is not a run of maejax"),
    (["pretrain", "broken", "--config.evals=nosuch"], "none of the 1 image files can be read"),
    ([*DIGITS, "--config.evals=knm"], "did you mean knn?"),
]


def test_mistakes(tmp_path):
    """In one process, where no device can be touched; `test_mutations` has some hundred more, and some alone."""
    results = run_all([arguments for arguments, _ in MISTAKES], tmp_path)
    for (arguments, says), result in zip(MISTAKES, results, strict=True):
        assert not problem(result) and says in result["error"], (arguments, result)


def test_config_flags_are_taken_out():
    file, assignments, others = split_config_flags(
        ["data", "--config=a.py", "--config.mask.ratio=0.5", "--config.seed", "3", "--workdir=x"]
    )
    assert (file, assignments, others) == ("a.py", {"mask.ratio": "0.5", "seed": "3"}, ["data", "--workdir=x"])


def test_help_shows_examples_and_keys(capsys):
    for arguments, text in (
        (["--help"], "pretrain"),
        (["pretrain", "--help"], "maejax pretrain ~/photos --workdir=runs/photos"),
        (["reconstruct", "--help"], "maejax reconstruct runs/photos"),
        (["pretrain", "--keys"], "--config.mask.ratio=0.75"),
        (["--version"], maejax.__version__),
    ):
        try:
            assert main(arguments) == 0
        except SystemExit as stop:  # argparse's --help
            assert stop.code == 0
        assert text in capsys.readouterr().out
    assert main([]) == 2
    assert len(list(configs.flatten(configs.default()))) > 60
