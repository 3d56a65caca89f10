"""`maejax data pack`: what is in the shards, read by Pillow; and what a kill leaves."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from maejax import cli
from maejax.data.sources import ArrayRecords, make_source

PHOTO = load_sample_image("flower.jpg")  # 427 x 640


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes; large and small images, an upright one by EXIF, a grey one, two that cannot be read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "cats/a.jpg": encoded(PHOTO, quality=95), "cats/small.png": encoded(PHOTO[:90, :100], "PNG"),
        "cats/turned.jpg": encoded(PHOTO[:, :500], exif=exif.tobytes()), "dogs/grey.jpg": encoded(PHOTO[..., 0]),
        "dogs/cut.jpg": encoded(PHOTO)[:9000], "dogs/none.jpg": b"hello",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(content)
    return tmp_path


def test_a_pack_holds_smaller_images_with_their_labels(folder, capsys):
    arguments = ["data", "pack", f"{folder}/src", f"{folder}/dst", "--size=128", "--workers=1"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "packing   6 images" in out and "packed    4 images" in out
    assert "left out  2 (1 truncated, 1 not_an_image)" in out
    source = make_source(f"{folder}/dst", split="train")
    assert isinstance(source, ArrayRecords) and len(source) == 4 and source.num_classes == 2
    records = [source[index] for index in range(4)]
    assert [record["label"] for record in records] == [0, 0, 0, 1]
    images = [Image.open(io.BytesIO(record["image"])) for record in records]
    assert [image.size for image in images] == [(192, 128), (100, 90), (128, 150), (192, 128)]
    assert records[1]["image"] == (folder / "src" / "cats/small.png").read_bytes()  # small enough: as it was
    assert [image.format for image in images] == ["JPEG", "PNG", "JPEG", "JPEG"]
    expected = Image.fromarray(PHOTO).resize((192, 128), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(expected)).mean() < 4  # JPEG, quality 90, 4:2:0
    turned = Image.open(folder / "src" / "cats/turned.jpg").rotate(-90, expand=True).resize((128, 150))
    assert np.abs(np.asarray(images[2]).astype(int) - np.asarray(turned)).mean() < 6

    manifest = json.loads((folder / "dst" / "pack.json").read_text())
    assert manifest["classes"] == ["cats", "dogs"] and manifest["bad_images"] == {"truncated": 1, "not_an_image": 1}
    listed = [json.loads(line) for line in (folder / "dst" / "bad_images.jsonl").read_text().splitlines()]
    assert [(entry["name"], entry["cause"]) for entry in listed] == [
        ("dogs/cut.jpg", "truncated"), ("dogs/none.jpg", "not_an_image"),
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "dst").iterdir()) == [
        ".lock", "bad_images.jsonl", "pack.json", "shard-00000.array_record",
    ]  # fmt: skip
    assert cli.main(arguments) == 0 and "complete already" in capsys.readouterr().out


def test_mistakes_are_one_line(folder, capsys):
    def fails(*arguments):
        assert cli.main(["data", "pack", *arguments]) == 2
        return capsys.readouterr().err

    src, dst = f"{folder}/src", f"{folder}/dst"
    assert "--size=2 must lie between 16 and 65500" in fails(src, dst, "--size=2")
    assert "--channels=4 must be 1 or 3" in fails(src, dst, "--channels=4")
    assert "does not exist" in fails(f"{folder}/nothing", dst)
    assert "is not empty and holds no pack" in fails(src, f"{folder}/src/cats")
    assert cli.main(["data", "pack", src, dst, "--size=64", "--workers=1"]) == 0
    assert "was packed with size=64, not 65" in fails(src, dst, "--size=65")
    (folder / "src" / "cats" / "more.jpg").write_bytes(encoded(PHOTO))
    assert "was packed with source=" in fails(src, dst, "--size=64")
    empty = folder / "empty"
    empty.mkdir()
    (empty / "x.jpg").write_bytes(b"hello")
    assert "none of the 1 images can be read" in fails(str(empty), f"{folder}/other")


@pytest.mark.parametrize("fault", ["pack_record:*:1100:kill", "pack_shard:*:1:kill"])
def test_a_kill_leaves_shards_complete_or_absent(tmp_path, fault, capsys):
    # 1,797 digits are two shards: the first is killed after its rename, or the second on the way.
    run = [
        sys.executable,
        "-m",
        "maejax",
        "data",
        "pack",
        "digits",
        str(tmp_path / "dst"),
        "--split=all",
        "--workers=1",
    ]
    killed = subprocess.run(run, env=os.environ | {"MAEJAX_FAULT": fault}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "dst" / "pack.json").exists()
    assert cli.main(["pretrain", str(tmp_path / "dst"), f"--workdir={tmp_path}/run"]) == 2
    assert "is half packed; run the same maejax data pack again" in capsys.readouterr().err
    assert cli.main(run[3:]) == 0
    again = capsys.readouterr().out
    assert ("1 of 2 shards are there" in again) == ("record" in fault)

    assert cli.main(["data", "pack", "digits", str(tmp_path / "whole"), "--split=all", "--workers=1"]) == 0
    left, right = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("[!.]*")} for name in ("dst", "whole")
    )
    assert left == right and len(left) == 3
    digits, packed = make_source("digits", split="all"), make_source(str(tmp_path / "dst"), split="train")
    assert len(packed) == 1797 and packed.num_classes == 10
    assert len(make_source(str(tmp_path), split="dst")) == 1797  # in the place of a split's folder
    for index in (0, 1023, 1024, 1796):
        record = packed[index]
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
        np.testing.assert_array_equal(pixels, digits[index]["image"].repeat(3, axis=2))
        assert record["label"] == digits[index]["label"]


@pytest.mark.slow
def test_workers_write_the_same_shards(tmp_path):
    for workers in (1, 2):
        arguments = ["data", "pack", "digits", f"{tmp_path}/{workers}", "--split=all", f"--workers={workers}"]
        assert cli.main(arguments) == 0
    one, two = (json.loads((tmp_path / name / "pack.json").read_text()) for name in "12")
    assert one == two


def test_failing_storage_is_told(tmp_path, monkeypatch, capsys):
    from maejax import faults

    monkeypatch.setattr(faults, "_wanted", [("pack_record", "*", "3", "raise=ENOSPC")])
    monkeypatch.setattr(faults, "_passages", type(faults._passages)())
    assert cli.main(["data", "pack", "digits", f"{tmp_path}/dst", "--workers=1"]) == 74
    assert "could not be written: [Errno 28] No space left on device" in capsys.readouterr().err
