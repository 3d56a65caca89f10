"""`maejax bench`: that stages and steps are timed, and its arithmetic."""

import json

import pytest

from maejax import cli
from maejax import config as configs
from maejax.commands.bench_data import STAGES, lines, needs
from maejax.commands.bench_step import lines as step_lines

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


def test_step_loop_and_start(capsys):
    small = ["--config=pretrain_digits", "--config.model.depth=1", "--config.decoder.depth=1", "--config.batch_size=8"]
    arguments = ["bench", "step", *small, "--config.data.workers=0", "--windows=2", "--steps=3", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    for kind in ("", "loop_"):
        assert found[f"{kind}img_per_sec"] == pytest.approx(8e3 / found[f"{kind or 'bare_'}ms"])
    assert found["loop_over_bare"] > 0.5 and found["product_tflops"] > 0
    assert found["step_over_product"] == pytest.approx(found["model_tflops_per_device"] / found["product_tflops"])
    # Matrix products and attention by hand: 16 patches, 4 of them and the class token encoded, all 17 tokens decoded.
    c = configs.load("pretrain_digits")
    d, e, pixels = c.model.width or 192, c.decoder.width, 4 * 4 * c.data.channels
    forward = 24 * 5 * d * d + 4 * 25 * d + 24 * 17 * e * e + 4 * 17**2 * e + 2 * 5 * d * e + 2 * 12 * e * pixels
    by_hand = 3 * forward + 2 * 2 * 4 * pixels * d
    assert found["gflop_per_image"] == pytest.approx(by_hand / 1e9)
    assert 1 < found["xla_over_analytic"] < 2  # norms, softmax, GELU and the optimizer come on top
    assert 0 < found["temporaries_gb"] < 1 and 0 < found["arguments_gb"] < 1
    assert 0 < found["warm_over_cold"] < 1.2
    assert len(step_lines(found)) == 7


def test_mistakes_of_bench_step_are_one_line(capsys):
    for arguments, message in (
        (["--steps=0"], "must be at least 1"),
        (["--stesp=3"], "unknown argument '--stesp=3'"),
        (["--config.model.size=Q"], "model.size"),
        (["batch_size=3"], "would be ignored; write --config.batch_size=3"),
    ):
        assert cli.main(["bench", "step", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
