"""`maejax bench data`: that its stages are timed, and its arithmetic."""

import json

import pytest

from maejax import cli
from maejax import config as configs
from maejax.commands.bench_data import STAGES, lines, needs

QUICK = ["--config=pretrain_digits", "--images=40", "--seconds=0.2", "--config.data.workers=0"]


@pytest.mark.parametrize("extra", [[], ["--config.data.cache=8", "--config.data.repeats=2"]])
def test_stages_and_total(capsys, extra):
    assert cli.main(["bench", "data", "digits", *QUICK, *extra, "--chip=h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["stages_ms"]) == STAGES and all(value > 0 for value in found["stages_ms"].values())
    assert found["img_per_sec_per_core"] == pytest.approx(1e3 / sum(found["stages_ms"].values()), rel=0.05)
    assert found["img_per_sec"] > 50 and found["images"] == 1438
    assert found["bytes_per_image"] == 16 * 16 + 4 * 16 + 4  # pixels, 16 numbers of patches, a label
    assert found["cores_needed"] == pytest.approx(found["chip_img_per_sec"] / found["img_per_sec_per_core"], rel=0.01)
    assert any("cores like these" in line for line in lines(found))


def test_what_a_chip_takes():
    # 989 TFLOP/s at 40 % over the 58.5 GFLOP of a ViT-B/16 step (docs/scaling.md): 6.8 thousand images a second.
    found = needs(configs.load("pretrain_vit_b16_imagenet"), "h100", 0.4, 500.0)
    assert found["chip_img_per_sec"] == pytest.approx(0.4 * 989e12 / 58.2e9, rel=0.02)
    assert found["cores_needed"] == pytest.approx(found["chip_img_per_sec"] / 500, rel=0.01)


def test_mistakes_are_one_line(capsys):
    for arguments, message in (
        ([], "say what to measure: maejax bench data"),
        (["dta"], "did you mean data?"),
        (["data", "digits", "--mfu=2"], "--mfu=2.0 must lie between 0 and 1"),
        (["data", "digits", "--chip=h300"], "invalid choice"),
        (["data", "digits", "batch_size=3"], "would be ignored; write --config.batch_size=3"),
        (["data", "/does/not/exist"], "does not exist"),
    ):
        assert cli.main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["bench", "--help"]) == 0
