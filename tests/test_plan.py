"""`maejax plan`: names of hardware, arithmetic by hand, mistakes in one line; with libtpu, a small real compilation."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maejax import build
from maejax import config as configs
from maejax.cli import main
from maejax.commands.plan import lines
from maejax.errors import UsageError
from maejax.forecast import bytes_a_device, forecast, out_of_memory, traced_flops
from maejax.mesh import make_mesh, to_global
from maejax.models import SIZES
from maejax.overrides import override
from maejax.program import make_program
from maejax.targets import chips_of, parse_targets, tpu_names
from maejax.tree import count, named_leaves

L16 = "pretrain_vit_l16_imagenet"
SMALL = {
    "model.width": "64", "model.depth": "3", "model.heads": "4", "model.patch": "4", "image_size": "16",
    "decoder.width": "32", "decoder.depth": "2", "decoder.heads": "4", "batch_size": "16", "total_steps": "10",
    "base_lr": "1e-2",
}  # fmt: skip


def small(**keys):
    return override(configs.default(), SMALL | {key.replace("__", "."): value for key, value in keys.items()})


def refused(capfd, *arguments):
    """The one line that a command is refused with."""
    assert main(["plan", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("maejax: ") and err.count("\n") == 1, err
    return err


# ---- Names ----------------------------------------------------------------------------------------------------------


def test_names_count_what_google_counts():
    by_name = {t.name: (t.num_devices, t.shape) for t in parse_targets("v5e-32,v6e-256,v4-128,v5p-256,v5p:2x4x4")}
    assert by_name == {
        "v5e-32": (32, "4x8"), "v6e-256": (256, "16x16"), "v4-128": (64, "4x4x4"), "v5p-256": (128, "4x4x8"),
        "v5p:2x4x4": (32, "2x4x4"),
    }  # fmt: skip
    assert parse_targets("gpu:h100x16")[0][1:] == ("h100", 16, "")
    for name, (chip, shape) in tpu_names().items():
        assert int(name.partition("-")[2]) == chips_of(shape) * (2 if chip in ("v4", "v5p") else 1)


@pytest.mark.parametrize(
    "on, says",
    [
        ("v5e-31", "--on=v5e-31: there is v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256, and v5e:4x4"),
        ("tpu9", "--on=tpu9 is not known; there is v4-8, "),
        ("gpu:v100x8", "'v100' is not one of a100, h100, h200, b200"),
        ("gpu:h100x0", "--on=gpu:h100x0 is not known"),
        ("v5e:4x0", "--on=v5e:4x0: there is v5e-1"),
    ],
)
def test_unknown_hardware_lists_what_is_known(on, says, capfd):
    assert says in refused(capfd, f"--config={L16}", f"--on={on}")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--on=gpu:h100x8"], "say what to plan: --config=RECIPE"),
        ([f"--config={L16}", "--on=gpu:h100x6"], "batch_size=4096 is not divisible by 6"),
        ([f"--config={L16}", "--on=gpu:h100x8", "--config.mesh.data=2"], "does not make 8 devices"),
        ([f"--config={L16}", "--on=gpu:h100x8", "--num-examples=0"], "--num-examples=0 must be at least 1"),
        ([f"--config={L16}", "--on=gpu:h100x8", "batch_size=8"], "write --config.batch_size=8"),
        (["--config=finetune_vit_b16_imagenet", "--on=gpu:h100x8"], "--config.finetune.num_classes=1000"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capfd):
    assert says in refused(capfd, *arguments)


def test_missing_libtpu_names_the_extra(capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "libtpu, which is not installed: pip install 'maejax[tpu]'" in refused(
        capfd, f"--config={L16}", "--on=v5e-32"
    )


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def test_sizes_of_the_large_networks():
    """Parameters of an encoder by hand: 12 d^2 a block where the MLP has four widths (g: 4 d^2 + 2 d 6144)."""
    for name, millions in (("2B", 1889), ("6.5B", 6445), ("g", 1009)):
        c = override(configs.load("pretrain_vit_h14_imagenet"), {"model.size": name})
        width, depth, _ = SIZES[name]
        encoder = build.make_encoder(c)
        hidden = round(encoder.mlp_ratio * width)
        assert hidden == {"2B": 10240, "6.5B": 16384, "g": 6144}[name]
        assert round(depth * (4 * width**2 + 2 * width * hidden) / 1e6) == pytest.approx(millions, rel=0.003)


def test_bytes_of_a_device_follow_the_shardings():
    mesh = make_mesh({"dcn_data": 1, "data": 4, "fsdp": 2, "tensor": 1})
    split = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = [
        jax.ShapeDtypeStruct((3, 64), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
    ]
    assert bytes_a_device(tree) == 3 * 64 * 4 // 8 + 10


def test_traced_products_are_the_analytic_ones():
    """The analytic formula leaves out nothing but what is computed twice: the scores q.k of every attention."""
    c = small()
    p = make_program(c, make_mesh(c.mesh), num_examples=100, num_classes=None)
    s = build.shapes_of(c)
    scores = 2 * (3 * (s.visible + 1) ** 2 * 64 + 2 * (s.patches + 1) ** 2 * 32)
    assert traced_flops(p) == pytest.approx(16 * (build.flops_per_image(c) + scores), rel=0.02)


def test_gpus_by_hand():
    """L/16 on eight H100: bytes of the state are 12 a parameter over eight, time is FLOPs at 40 % of the peak."""
    c = configs.load(L16)
    plan = forecast(c, parse_targets("gpu:h100x8")[0], 1_281_167)
    assert plan.how == "analytic, not compiled" and plan.cycles is None and plan.traffic is None
    state = plan.memory["parameters"] + plan.memory["optimizer"]
    assert state == pytest.approx(12 * plan.num_parameters / 8, rel=0.01)
    assert plan.optimizer_share == pytest.approx(1, abs=0.02)
    assert plan.least_traffic == pytest.approx(2 * 2 * plan.num_parameters * 7 / 8, rel=1e-6)
    assert plan.total_steps == 800 * 1_281_167 // 4096
    assert plan.compute == pytest.approx(4096 * 124.2e9 / 8 / (0.4 * 989e12), rel=0.01)
    assert plan.hours == pytest.approx(plan.total_steps * (plan.compute + plan.least_traffic / 450e9) / 3600)
    text = "\n".join(lines(plan, c, None))
    assert "analytic, not compiled" in text and "predicted" not in text


def test_what_does_not_fit_says_by_how_much():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (220.16G) exceeds available HBM (95.73G). HLO module: jit_train_step."
    )
    assert out_of_memory(message, {"parameters": 1e9}) == 220.16 * 2**30
    total = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."
    assert out_of_memory(total, {"parameters": 1e9}) == 20 * 2**30 - 1e9
    with pytest.raises(UsageError, match="the step does not compile: INTERNAL"):
        out_of_memory("INTERNAL: no such luck", {})


def test_a_remedy_is_told_and_json_is_json(capfd):
    """Four hundred thousand images at once: the activations of all do not fit into one GPU, their inputs do."""
    arguments = ["plan", "--config=pretrain_digits", "--on=gpu:a100x1", "--json"]
    assert main([*arguments, f"--config.batch_size={3 * 2**17}", "--config.total_steps=10"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)["plans"][0]
    assert not found["fits"] and found["memory"]["total"] > 80e9
    assert captured.err.startswith("gpu:a100x1 is too small; trying --config.model.remat=dots\n")
    assert found["remedy"] is not None and set(found["remedy"]) <= {"model.remat", "grad_accum_steps"}


# ---- What is planned is what is trained -----------------------------------------------------------------------------


def curve(**keys):
    """Losses of five steps of a program on eight devices."""
    c = small(**keys)
    mesh = make_mesh(c.mesh)
    p = make_program(c, mesh, num_examples=100, num_classes=None)
    state, losses, rng = p.new_state(), [], np.random.default_rng(0)
    for _ in range(5):
        order = np.stack([rng.permutation(16) for _ in range(16)]).astype(np.int32)
        image = rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
        batch = {"image": image, "visible": order[:, :4], "masked": order[:, 4:]}
        state, metrics = p.train_step(state, to_global(batch, mesh))
        losses.append(float(metrics["train/loss"]))
    return np.array(losses), p, state


@pytest.mark.parametrize(
    "keys",
    [
        {"sharding": "zero1"},
        {"sharding": "fsdp", "mesh__data": "1", "mesh__fsdp": "-1"},
        pytest.param({"sharding": "zero1", "grad_accum_steps": "2"}, marks=pytest.mark.slow),
        pytest.param(
            {"sharding": "fsdp", "mesh__data": "2", "mesh__fsdp": "4", "model__remat": "full"}, marks=pytest.mark.slow
        ),
    ],
)
def test_copies_and_layers_collected_on_the_way_change_nothing(keys, alone):
    losses, p, state = curve(**keys)
    assert alone[-1] < alone[0]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert bytes_a_device(p.shapes.params) < 4 * count(p.shapes.params) / 2


@pytest.fixture(scope="module")
def alone():
    return curve(sharding="replicate")[0]


@pytest.mark.slow
def test_bfloat16_copies_keep_float32_gradients():
    """With bfloat16 products the copy is bfloat16; sums over microbatches and moments are not."""
    losses, p, state = curve(sharding="zero1", grad_accum_steps="2", dtype="bfloat16")
    whole, *_ = curve(sharding="replicate", grad_accum_steps="2", dtype="bfloat16")
    np.testing.assert_allclose(losses, whole, rtol=2e-2)
    moments = named_leaves(state.opt_state)
    assert all(leaf.dtype == jnp.float32 for name, leaf in moments.items() if "/mu/" in name or "/nu/" in name)


# ---- Compiled for a TPU that is not there ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_step_compiles_for_a_pod(capfd):
    """Of 4 x 8 chips; on square slices the compiler reduces where it could scatter (docs/scaling.md)."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing was compiled for a TPU (maejax[tpu])")
    assert main(["plan", f"--config={L16}", "--on=v5e-32", "--json", "--config.batch_size=256",
                 "--config.model.depth=2", "--config.decoder.depth=1"]) == 0  # fmt: skip
    found = json.loads(capfd.readouterr().out)["plans"][0]
    assert found["fits"] and found["how"] == "predicted" and found["mesh"]["data"] == 32
    assert 0 < found["kernel_cycles"] < found["cycles"]
    assert found["optimizer_share"] <= 1.05
    assert sum(found["traffic"].values()) <= 1.10 * found["least_traffic"]
    assert found["traffic"]["all-to-all"] == 0
    assert found["flops"] <= 1.10 * found["least_flops"]
    # The compiler cannot expect more than the peak, nor, one hopes, a hundredth of it.
    assert 0.01 < found["mfu"] < 1 and math.isfinite(found["hours"])


@pytest.mark.slow
def test_an_unknown_torus_is_refused_by_libtpu(capfd):
    pytest.importorskip("libtpu", reason="libtpu is not installed: no topology was asked for (maejax[tpu])")
    assert "usual for v5e: 1x1, 2x2" in refused(capfd, f"--config={L16}", "--on=v5e:3x3")
