"""Wrong commands by the hundred, and a process that runs them where touching a device is an error."""
# ruff: noqa: E501 - tables

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maejax import config as configs

ROOT = Path(__file__).parents[1]
DIGITS = ("pretrain", "--config=pretrain_digits", "--workdir=run")
PHOTOS = ("pretrain", "photos", "--workdir=run")

# Runs every command of stdin in one process. No JAX platform has that name, so whoever asks for a device fails.
RUN_ALL = """
import contextlib, io, json, sys, time
import jax  # has read its variables before a command can set any
from maejax.cli import main
for arguments in json.load(sys.stdin):
    err, start = io.StringIO(), time.process_time()  # of this process: others may be at work, too
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except BaseException as error:
            code = f"{type(error).__name__} {error}"
    result = {"code": code, "error": err.getvalue(), "seconds": time.process_time() - start}
    print(json.dumps(result), flush=True)
"""


def run_all(commands: Sequence[Sequence[str]], folder: Path) -> list[dict[str, Any]]:
    """What became of each command: its exit code (or exception), what it said on stderr, its seconds."""
    make_places(folder)
    before = listing(folder)
    env = os.environ | {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(list(map(list, commands))), capture_output=True, text=True,
        cwd=folder, env=env,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(commands), done.stderr
    assert listing(folder) == before, "something was written"
    return results


def problem(result: dict[str, Any]) -> str:
    """What is wrong with a refusal; "" if it is as it should be."""
    if result["code"] != 2:
        return f"exit code {result['code']}"
    if not re.fullmatch(r"maejax: [^\n]+\n", result["error"]):
        return "not one line"
    return "" if result["seconds"] < 5 else "too slow"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def make_places(folder: Path) -> None:
    """Folders and recipes that the commands name."""
    from PIL import Image

    for name in ("photos", "empty", "foreign", "broken"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "foreign" / "thesis.tex").write_text("precious")
    (folder / "broken" / "x.jpg").write_text("hello")
    (folder / "file").write_text("hello")
    recipe = "from maejax import config\ndef get_config():\n    c = config.default()\n    c.total_epochs = 1.0\n"
    for name, text in (
        ("exits", "import sys\nsys.exit(0)"), ("syntax", "x ="), ("number", "def get_config(): return 3"),
        ("typo", recipe + "    c.mask.raito = 0.5\n    return c"), ("none", recipe + "    c.seed = 0"),
        ("kind", recipe + "    c.batch_size = 'many'\n    return c"), ("dict", "def get_config(): return {}"),
        ("range", recipe + "    c.mask.ratio = 2.0\n    return c"), ("args", "def get_config(size): return size"),
        ("float", recipe + "    c.image_size = (16.5,)\n    return c"), ("both", recipe + "    c.total_steps = 3\n    return c"),
    ):  # fmt: skip
        (folder / f"{name}.py").write_text(text)


def flags(*pairs: str, base: Sequence[str] = DIGITS) -> list[str]:
    return [*base, *(f"--config.{pair}" for pair in pairs)]


# (key=value, ...) with what the refusal says.
VALUES = [
    # out of range
    *(("decoder.subset=" + value, "decoder.subset=") for value in ("0", "-0.5", "1.5", "nan", "none")),
    ("decoder.kind=crosss", "decoder.kind"), ("decoder.kind=", "decoder.kind"),
    *(("data.sides=" + value, "data.sides") for value in ("16,8", "8", "7,16", "0,16", "-8,16", "8.5,16", "a", "4,16")),
    *(("mask.ratio=" + value, "must lie between 0 and 1") for value in ("0", "1", "-0.5", "1.5", "75")),
    ("mask.ratio=nan", "mask.ratio=nan"), ("mask.ratio=inf", "mask.ratio=inf"),
    *(("batch_size=" + value, "batch_size=") for value in ("0", "-1", "-128", "10000000000")),
    *(("grad_accum_steps=" + value, "grad_accum_steps=") for value in ("0", "-1", "3", "1000")),
    *((f"{key}=-1", f"{key}=-1") for key in (
        "seed", "base_lr", "min_lr", "optimizer.b1", "optimizer.b2", "optimizer.eps", "optimizer.weight_decay",
        "optimizer.clip_norm", "optimizer.layer_decay", "optimizer.ema_decay", "model.width", "model.depth",
        "model.heads", "model.mlp_ratio", "model.drop_path", "decoder.width", "decoder.depth", "decoder.heads",
        "data.color_jitter", "data.rand_augment", "data.erasing", "data.eval_crop", "data.workers", "data.prefetch",
        "data.record_seconds", "data.max_pixels", "data.max_bad_fraction", "data.channels", "mesh.dcn_data",
        "keep_checkpoints", "eval_images", "warmup_steps", "save_steps", "log_steps", "picture_epochs",
    )),
    *((f"{key}=nan", f"{key}=nan") for key in (
        "base_lr", "min_lr", "optimizer.b1", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm",
        "model.mlp_ratio", "model.drop_path", "data.color_jitter", "data.erasing", "data.max_bad_fraction",
        "total_epochs", "save_epochs", "data.mean", "data.std",
    )),
    *((f"{key}=0", f"{key}=0") for key in (
        "decoder.heads", "model.heads", "model.depth", "model.width", "data.prefetch", "data.max_pixels", "mesh.dcn_data",
        "optimizer.eps", "total_steps", "save_steps", "data.channels", "optimizer.clip_norm",
    )),
    ("optimizer.b2=1", "optimizer.b2=1.0"), ("base_lr=inf", "base_lr=inf"), ("total_epochs=inf", "total_epochs=inf"),
    ("total_steps=1e12", "total_steps="), ("data.max_bad_fraction=1.01", "between 0 and 1"),
    ("model.drop_path=1", "below 1"), ("optimizer.ema_decay=1", "between 0 and 1"), ("data.rand_augment=11", "0 (none) and 10"),
    # kinds
    *((f"{key}={value}", "expected a whole number") for key in ("batch_size", "seed", "decoder.depth", "data.prefetch")
      for value in ("many", "1.5", "0x10", "nan")),
    *((f"{key}=big", "expected a number") for key in ("base_lr", "mask.ratio", "optimizer.b1", "data.erasing")),
    *((f"{key}=perhaps", "expected true or false") for key in ("norm_pix", "data.flip", "model.scan", "tensorboard")),
    *((f"{key}={value}", "expected") for key in ("image_size", "model.patch", "data.mean") for value in ("large", "[", "4;4")),
    *((f"{key}=", "must have a value") for key in ("image_size", "model.patch", "data.mean", "batch_size")),
    *((f"{key}=none", f"{key}=none") for key in ("batch_size", "seed", "mask.ratio", "norm_pix", "image_size", "data.std")),
    ("image_size=16.5", "whole numbers"), ("model.patch=4.5", "whole numbers"), ("image_size=true", "expected"),
    # sizes that do not fit each other
    *((f"image_size={side}", "is not divisible by the patch's 4") for side in ("17", "16,18", "3", "0")),
    ("model.patch=5", "is not divisible by the patch's 5"), ("model.patch=0", "is not divisible"), ("image_size=-16", "image_size"),
    ("image_size=16,16,16", "one number or two"), ("model.patch=1,2,3", "one number or two"),
    ("model.width=130", "must be divisible by 4"), ("decoder.width=30", "must be divisible by 4"),
    ("model.heads=7", "must be divisible by 4"), ("decoder.heads=7", "must be divisible by 4"),
    ("mesh.data=7", "is not divisible by mesh.data"), ("mesh.fsdp=3", "is not divisible by"), ("mesh.tensor=3", "must divide"), ("mesh.tensor=0", "must be positive"),
    ("mesh.data=0", "must be positive"), ("mesh.data=-2", "must be positive"), ("mesh.fsdp=-1", "one of them may be -1"),
    ("data.channels=5", "none of the 1438 image files can be read (64 channels)"), ("data.channels=5,", "whole number"), ("data.mean=0.5,0.5", "needs one value"),
    ("data.std=0", "must be positive"), ("data.crop_scale=0.5", "two positive numbers"), ("data.crop_scale=1,0.5", "the smaller first"),
    ("data.crop_ratio=0,1", "two positive numbers"), ("profile_steps=5", "FIRST:LAST"), ("profile_steps=9:5", "ends before"),
    # names
    ("model.size=XL", "is not one of"), ("mask.sampler=rendom", "did you mean random?"), ("sharding=zero", "did you mean zero1?"),
    ("dtype=float16", "is not one of float32, bfloat16"), ("dtype=float", "did you mean float32?"), ("optimizer.name=adam", "did you mean adamw?"),
    ("model.positions=fix", "did you mean fixed?"), ("model.remat=all", "is not one of"), ("data.crop=centre", "did you mean center?"),
    ("objective=mea", "did you mean mae?"), ("evals=knm", "did you mean knn?"), ("evals=accuracy", "needs a classifier"),
    ("objective=os", "is not one of"), ("objective=os.path:nosuch", "cannot be imported"),
    # places
    ("data.source=nosuch", "does not exist"), ("data.source=empty", "no image file in"), ("data.source=", "data.source"),
    ("data.source=file", "is a file, not a folder"), ("data.source=zip:x", "unknown scheme"), ("data.split=trian", "its splits are"),
    ("data.source=tfds:nosuch", "is not prepared"), ("data.source=arrayrecord:nosuch*", "no file matches"),
    ("data.source=arrayrecord:file", "cannot be read"), ("data.source=" + "x" * 5000, "data.source"),
    ("data.source=~nosuchuser/photos", "~nosuchuser"), ("data.source=broken", "none of the 1 image files"),
    ("data.source=https://host/photos", "unknown scheme"), ("data.source=pipe:cat x", "unknown scheme"),
]  # fmt: skip

COMMANDS = [
    (["pretrain"], "say what to train on"),
    (["pretain", "photos"], "did you mean pretrain?"),
    ([*DIGITS, "--config.mask.ratio"], "needs a value"),
    ([*DIGITS, "--confg.mask.ratio=0.5"], "unknown argument"),
    ([*DIGITS, "--no-such-flag"], "unknown argument '--no-such-flag'"),
    ([*DIGITS, "mask.ratio=0.5"], "write --config.mask.ratio=0.5"),
    ([*DIGITS, "--mask.ratio=0.5"], "write --config.mask.ratio=0.5"),
    ([*DIGITS, "--config.mask=0.5"], "is a group of keys"),
    *(([*DIGITS[:1], f"--config={name}.py", "--workdir=run"], says) for name, says in (
        ("exits", "config file exits.py"), ("syntax", "SyntaxError"), ("number", "returned int"), ("typo", "raito"),
        ("none", "returned NoneType"), ("kind", "config file kind.py"), ("dict", "returned dict"), ("range", "mask.ratio=2.0"),
        ("args", "config file args.py"), ("nosuch", "shipped recipes:"), ("float", "image_size"), ("both", "are both set"),
    )),
    (["pretrain", "--config=empty", "--workdir=run"], "shipped recipes:"),
    (["pretrain", "--config=file", "--workdir=run"], "config file file"),
    (["pretrain", "--config=", "--workdir=run"], "shipped recipes:"),
    *(([*DIGITS[:2], f"--workdir={place}"], says) for place, says in (
        ("foreign", "is not empty and not a run"), ("file", "is a file"), ("/proc/nosuch/run", "is not a folder that can be written to"),
        ("/dev/null/run", "--workdir=/dev/null/run"), ("y" * 300, "--workdir=yyy"), ("file/run", "--workdir=file/run"),
    )),
    ([*DIGITS, "--from=empty"], "is not a run of maejax"), ([*DIGITS, "--from=nosuch"], "is not a run of maejax"),
    ([*DIGITS, "--process-id=1"], "needs --coordinator"), ([*DIGITS, "--fake-processes=0"], "between 1 and 64"),
    ([*DIGITS, "--fake-processes=x"], "--fake-processes"), ([*DIGITS, "--num-processes=2", "--coordinator=h:1", "--process-id=2"], "0 to 1"),
    ([*PHOTOS, "--fake-processes=2"], "several processes need"),
    *((flags(pair, base=PHOTOS), says) for pair, says in (
        ("mask.ratio=1.5", "must lie between 0 and 1"), ("batch_size=0", "batch_size=0"), ("batch_size=many", "whole number"),
        ("mask.raito=0.5", "did you mean --config.mask.ratio?"), ("data.std=0", "must be positive"), ("image_size=33", "not divisible"),
        ("total_steps=0", "total_steps=0"), ("optimizer.name=adam", "did you mean adamw?"), ("model.size=XL", "is not one of"),
        ("mesh.data=0", "must be positive"), ("total_epochs=nan", "total_epochs=nan"), ("warmup_steps=-1", "warmup_steps=-1"),
    )),
    (["pretrain", "empty", "--workdir=run"], "no image file in"), (["pretrain", "broken", "--workdir=run"], "none of the 1"),
    (["finetune", "--from=empty"], "is not a run of maejax"), (["evaluate", "empty"], "is not a run of maejax"),
    (["reconstruct", "empty"], "is not a run of maejax"), (["report", "empty"], "is neither a run nor a sweep"), (["watch", "empty", "--once"], "is not a run"),
    (["finetune", "--config=finetune_vit_ti4_cifar10", "--workdir=run", "--config.finetune.smoothing=2"], "finetune.smoothing=2.0"),
    (["finetune", "--config=finetune_vit_ti4_cifar10", "--workdir=run", "--config.finetune.blocks=-1"], "finetune.blocks=-1"),
    (flags("finetune.num_classes=0"), "finetune.num_classes=0 must be at least 1"),
]  # fmt: skip

TABLE = [*((flags(pair), says) for pair, says in VALUES), *COMMANDS]


# ---- Typos ----------------------------------------------------------------------------------------------------------

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def typo(key: str, rng: random.Random) -> str:
    """`key` as a hurried person writes it: one slip, or another way to write the same."""
    known = {name for name, _ in configs.flatten(configs.default())}
    while True:
        at = rng.randrange(len(key))
        a, b = key[:at], key[at:]
        row = next((row for row in KEYBOARD if b[0] in row), "x")
        beside = row[min(max(row.find(b[0]) + rng.choice((-1, 1)), 0), len(row) - 1)]
        slip = rng.choice((
            a + b[1:], a + b[0] + b, a + b[1:2] + b[:1] + b[2:], a + beside + b[1:], a + beside + b,
            key.replace("_", ""), key.replace("_", "-"), key.replace(".", "_"), key.upper(), key + "s",
        ))  # fmt: skip
        sections = {name.partition(".")[0] for name in known if "." in name}
        aliases = {"steps", "epochs", "examples"}
        if slip not in known | sections | aliases | {""} and "=" not in slip and not slip.startswith("."):
            return slip


def typos(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(slip, the key that was meant); of some the group is forgotten, too, as in "raito"."""
    known = [name for name, _ in configs.flatten(configs.default())]
    leaves = [name.rpartition(".")[2] for name in known]
    found = []
    while len(found) < count:
        key = rng.choice(known)
        leaf = key.rpartition(".")[2]
        alone = len(leaf) > 4 and leaves.count(leaf) == 1 and rng.random() < 0.3
        found.append((typo(leaf if alone else key, rng), key))
    return found


def suggestion(error: str) -> str:
    found = re.search(r"did you mean --config\.([\w.]+)\?", error)
    return found[1] if found else ""


# ---- Fuzz -----------------------------------------------------------------------------------------------------------


def fuzz(rng: random.Random, count: int) -> list[list[str]]:
    """Values that are right for no key: of another kind, or no number."""
    config = configs.default()
    found = []
    while len(found) < count:
        key, value = rng.choice(list(configs.flatten(config)))
        owner: Any = config
        for part in key.split(".")[:-1]:
            owner = owner[part]
        kind = owner.get_type(key.rpartition(".")[2])
        junk = "".join(rng.choice("xyz{}[]!?~%") for _ in range(rng.randrange(1, 12)))
        wrong = {
            bool: ["2", "maybe", junk],
            int: ["1.5", "ten", junk, "-99999999", "nan"],
            float: ["ten", junk, "nan", "--1"],
        }
        wrong |= {tuple: [junk + ",", "a,b", "null", "1,,2"]}
        if kind in wrong:
            found.append(flags(f"{key}={rng.choice(wrong[kind])}", base=rng.choice((DIGITS, PHOTOS))))
    return found
