"""Secrets: masked wherever text goes, refused in commands and configs, in no byte of what a run leaves behind."""
# ruff: noqa: E501 - tables

import random
import subprocess
import sys
import time

import pytest
from secrets_planted import run_with_secrets

from maejax import redact
from maejax.check import check
from maejax.cli import main
from maejax.config import default, flatten
from maejax.errors import UsageError
from maejax.metrics import Console
from maejax.overrides import override
from maejax.redact import masked, masked_arguments

S = "Xq7pLw9zRt4vNb2k"
LEAKS = [
    f"https://me:{S}@host/data", f"s3://{S}@bucket/x", f"postgresql://u:p/{S}@h".replace("p/", ""), f"token={S}", f"HF_TOKEN={S}",
    f"--api-key={S}", f"--config.data.password={S}", f"{{'client_secret': '{S}'}}", f'"password": "{S}",', f"Api_Key: {S}",
    f"https://h/x?sig={S}&y=1", f"https://h/x?a=1&access_token={S}", f"gs://b?key={S}", f"AccountKey={S};EndpointSuffix=x",
    f"hf_{S}", f"ghp_{S}", f"sk-{S}", f"AKIA{S}", f"Authorization: eyJhbGciOiJI.{S}", f"aws_secret_access_key = {S}",
]  # fmt: skip
HARMLESS = [
    "--config.model.cls_token=True", "--config.model.mask_tokens=false", "/photos/a@b/c.jpg", "git+ssh://git@github.com/x/y@v1",
    "mask_token: new", "https://github.com/x/y@v1.0", "tfds:imagenet2012", "run  runs/ratio=0.5,seed=1", "s3://bucket/key/x",
    "64 patch tokens, 1 class token", "/data/tokens/train-*.array_record", "learned positions: cls_token, pos_embed",
]  # fmt: skip


@pytest.mark.parametrize("text", LEAKS)
def test_secrets_are_masked(text):
    assert S not in masked(text) and "***" in masked(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_are_left_alone(text):
    assert masked(text) == text


def test_arguments_in_two_and_values_of_the_environment(monkeypatch):
    assert masked_arguments(["x", "--token", S, "y"]) == ["x", "--token", "***", "y"]
    monkeypatch.setenv("SOME_API_KEY", f"value of {S}")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    redact._of_environment.cache_clear()
    try:
        assert masked(f"failed with value of {S}: true") == "failed with ***: true"
    finally:
        redact._of_environment.cache_clear()


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "://" * 50_000, "token" * 30_000, "eyJ" * 3_000, "a=" * 100_000, "-" * 200_000]
)
def test_long_lines_take_no_time(text):
    start = time.process_time()
    masked(text)
    assert time.process_time() - start < 2


def test_no_key_of_the_config_is_taken_for_a_secret():
    for key, value in flatten(default()):
        assert masked(f"--config.{key}={value}") == f"--config.{key}={value}"


def test_commands_and_configs_with_secrets_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = ["launch", "--on=local", "pretrain", "--config=pretrain_digits", "--workdir=runs/x"]
    for arguments in (
        ["pretrain", "--config=pretrain_digits", f"--config.data.dir=https://me:{S}@host/data"],
        ["pretrain", f"https://me:{S}@host/photos"], ["pretrain", "photos", "--token", S], ["evaluate", f"hf_{S}"],
        [*launch, f"--config.data.dir=https://{S}@host/data"],
        ["sweep", "--config=pretrain_digits", "--grid", f"config.data.dir=gs://b?key={S}"],
    ):  # fmt: skip
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and S not in error and "holds what looks like a secret" in error
    c = override(default(), {"total_steps": "1", "data.dir": f"gs://me:{S}@bucket"})
    with pytest.raises(UsageError, match=r"data.dir=gs://\*\*\*@bucket holds what looks like a secret"):
        check(c)
    assert not list(tmp_path.iterdir())


def test_the_log_and_tracebacks_are_masked(tmp_path):
    with pytest.raises(ValueError), Console(tmp_path / "train.log", quiet=True) as console:
        console.say(f"reading https://me:{S}@host")
        raise ValueError(f"token={S}")
    assert (tmp_path / "train.log").read_text().count("***") == 2 and S not in (tmp_path / "train.log").read_text()
    code = f"from maejax.redact import mask_tracebacks; mask_tracebacks(); raise ValueError('https://me:' + '{S[::-1]}'[::-1] + '@h')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: https://***@h" in done.stderr and S not in done.stderr


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_tells_no_secret_and_listens_to_nobody_outside(processes, tmp_path):
    found, listened = run_with_secrets(tmp_path, random.Random(0), processes)
    assert found == []
    assert bool(listened) == (processes > 1)
    assert listened <= {
        "0100007F",
        "0000000000000000FFFF00000100007F",
    }  # 127.0.0.1, the coordinator's, in two notations
