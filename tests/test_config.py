"""Keys, overrides, durations and what is refused."""

import pytest

from maejax import config as configs
from maejax.check import check
from maejax.errors import UsageError, import_object, look_up
from maejax.overrides import override
from maejax.suggest import reasons, suggest, with_warmup


def base(**assignments):
    c = configs.default()
    c.total_epochs = 10.0
    return override(c, {key.replace("__", "."): value for key, value in assignments.items()})


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("mask.ratio", "0.6", 0.6),
        ("mask.ratio", "1", 1.0),
        ("batch_size", "4_096", 4096),
        ("batch_size", "1e3", 1000),
        ("image_size", "160", (160,)),
        ("image_size", "(64, 32)", (64, 32)),
        ("data.mean", "0.5", (0.5,)),
        ("data.flip", "false", False),
        ("optimizer.clip_norm", "1", 1.0),
        ("optimizer.clip_norm", "none", None),
        ("data.source", "/photos", "/photos"),
        ("data.dir", "/tfds", "/tfds"),
    ],
)
def test_overrides_are_parsed_by_the_type_of_the_default(key, text, value):
    got = dict(configs.flatten(override(configs.default(), {key: text})))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "key, text, says",
    [
        ("mask.raito", "0.6", "did you mean --config.mask.ratio?"),
        ("ratio", "0.6", "did you mean --config.mask.ratio?"),
        ("batchsize", "8", "did you mean --config.batch_size?"),
        ("model.dept", "8", "did you mean --config.model.depth?"),
        ("qqqqq", "8", "keys: base_lr"),
        ("mask", "0.6", "is a group of keys; set one of mask.ratio, mask.sampler"),
        ("batch_size", "many", "expected a whole number"),
        ("batch_size", "1.5", "expected a whole number"),
        ("base_lr", "fast", "expected a number"),
        ("data.flip", "maybe", "expected true or false"),
        ("image_size", "big", "expected a number or several"),
    ],
)
def test_wrong_overrides_are_one_line(key, text, says):
    with pytest.raises(UsageError, match=says.replace("?", r"\?").replace("(", r"\(")) as caught:
        override(configs.default(), {key: text})
    assert "\n" not in str(caught.value) and f"--config.{key}" in str(caught.value)


def test_an_override_leaves_the_original_alone():
    c = configs.default().lock()
    changed = override(c, {"mask.ratio": "0.6", "model.size": "L"})
    assert (c.mask.ratio, c.model.size) == (0.75, "B")
    assert configs.differences(c, changed) == {"mask.ratio": (0.75, 0.6), "model.size": ("B", "L")}


@pytest.mark.parametrize(
    "assignments, says",
    [
        ({"mask.ratio": "1"}, "mask.ratio=1.0 must lie between 0 and 1"),
        ({"mask.ratio": "0"}, "mask.ratio=0.0 must lie between 0 and 1"),
        ({"image_size": "225"}, "image height 225 is not divisible by the patch's 16; use --config.image_size=224"),
        ({"image_size": "224,100"}, "image width 100 is not divisible"),
        ({"batch_size": "10", "grad_accum_steps": "4"}, "not divisible by grad_accum_steps=4"),
        ({"batch_size": "10", "mesh.data": "4"}, "not divisible by mesh.data x mesh.fsdp"),
        ({"mesh.data": "-1", "mesh.fsdp": "-1"}, "one of them may be -1"),
        ({"batch_size": "0"}, "batch_size=0 must be at least 1"),
        ({"dtype": "float16"}, "is not one of float32, bfloat16"),
        ({"data.channels": "5"}, "needs one value or one for each of the data.channels=5"),
        ({"warmup_epochs": "1", "warmup_steps": "5"}, "are both set"),
        ({"save_steps": "0"}, "save_steps=0 must be positive"),
        ({"data.crop_scale": "0.5"}, "two positive numbers"),
        ({"data.crop_scale": "0.5,2"}, "a scale at most 1"),
        ({"model.width": "30", "model.heads": "4"}, "must be divisible by 4 and by model.heads=4"),
        ({"optimizer.ema_decay": "2"}, "must lie between 0 and 1"),
        ({"total_epochs": "none"}, "the run has no length: set one of total_steps, total_epochs, total_examples"),
    ],
)
def test_what_cannot_be_is_refused(assignments, says):
    with pytest.raises(UsageError) as caught:
        check(base(**{key.replace(".", "__"): value for key, value in assignments.items()}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_durations():
    c = base(batch_size="100")
    assert configs.steps(c, "total", 1050) == 105  # 10 epochs of 10.5 steps
    assert configs.steps(base(batch_size="100", steps="7"), "total", 1050) == 7
    assert configs.steps(base(batch_size="100", examples="999"), "total", 1050) == 9
    assert configs.steps(c, "warmup", 1050) == 0 and configs.steps(c, "log", 1050) == 20
    assert configs.steps(base(batch_size="100", epochs="0.001"), "total", 1050) == 1


def test_setting_one_unit_clears_the_others():
    c = base(steps="7")
    assert (c.total_steps, c.total_epochs, c.total_examples) == (7, None, None)


def test_a_config_survives_json():
    c = base(image_size="64,32", optimizer__clip_norm="1")
    assert configs.differences(c, configs.from_dict(configs.to_dict(c))) == {}
    with pytest.raises(UsageError, match="does not know"):
        configs.from_dict({"nosuch": 1})


def test_every_shipped_recipe_is_a_run_that_can_start():
    from maejax.build import check_names, flops_per_image

    recipes = sorted(configs.recipes_folder().glob("*.py"))
    assert len(recipes) >= 5
    for recipe in recipes:
        c = configs.load(recipe)
        check(c)
        check_names(c)
        assert flops_per_image(c) > 0
    # Table 8 of the paper.
    c = configs.load("pretrain_vit_l16_imagenet")
    assert (c.batch_size, c.base_lr, c.optimizer.weight_decay, c.optimizer.b1, c.optimizer.b2) == (
        4096,
        1.5e-4,
        0.05,
        0.9,
        0.95,
    )
    assert (c.total_epochs, c.warmup_epochs, c.mask.ratio, c.data.crop_scale) == (800, 40, 0.75, (0.2, 1.0))


@pytest.mark.parametrize(
    "body, says",
    [
        ("def get_config(): return 3", "returned int, expected a ConfigDict"),
        ("def get_config(): 1/0", "ZeroDivisionError"),
        ("x =", "SyntaxError"),
        ("pass", "get_config"),
        (
            "from maejax import config\ndef get_config():\n c = config.default()\n c.mask.raito = 1\n return c",
            'Key "raito" does not exist',
        ),
    ],
)
def test_broken_recipes(tmp_path, body, says):
    file = tmp_path / "mine.py"
    file.write_text(body)
    with pytest.raises(UsageError, match=says) as caught:
        configs.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_lists_those_that_there_are():
    with pytest.raises(UsageError, match="shipped recipes: .*pretrain_digits"):
        configs.load("nosuch.py")


def test_look_ups_name_what_there_is():
    assert look_up({"a": 1}, "a", "key") == 1
    with pytest.raises(UsageError, match="mask.sampler='randon' is not one of random, block; did you mean random"):
        look_up({"random": 1, "block": 2}, "randon", "mask.sampler")
    assert import_object("math:sqrt", "key")(4) == 2
    with pytest.raises(UsageError, match="objective='math:nosuch' cannot be imported"):
        import_object("math:nosuch", "objective")


@pytest.mark.parametrize("images", [1, 5, 40, 300, 5000, 2_000_000])
@pytest.mark.parametrize("platform, devices", [("cpu", 1), ("cpu", 8), ("gpu", 8), ("tpu", 256)])
@pytest.mark.parametrize("side", [8, 100, 480])
def test_suggestions_can_always_start(images, platform, devices, side):
    c = suggest(source="x", num_images=images, median_side=side, platform=platform, num_devices=devices)
    c = with_warmup(c, images)
    check(c)
    assert c.batch_size % devices == 0
    assert configs.steps(c, "warmup", images) < configs.steps(c, "total", images)
    assert len(reasons(c, num_images=images, median_side=side, platform=platform)) == 4
