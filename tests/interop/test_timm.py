"""Against timm's ViTs, in both directions."""

import json

import numpy as np
import pytest
from goldens import images, normalized

from maejax.cli import main
from maejax.convert.infer import Hints
from maejax.convert.read import read


def ask(model, batch):
    import torch

    with torch.no_grad():
        return model.eval().forward_features(torch.from_numpy(normalized(batch))).numpy()


def ours(weights, batch):
    import jax

    from maejax import build

    encoder = build.make_objective(weights.config).encoder
    pixels = normalized(batch).transpose(0, 2, 3, 1)
    return np.asarray(jax.jit(lambda p: encoder.apply({"params": p}, pixels))(weights.tree["encoder"]))


def sincos(model):
    """The position table of MAE, in place of the random one."""
    import torch

    from maejax.convert.weights import fixed_table

    grid = model.patch_embed.grid_size
    with torch.no_grad():
        model.pos_embed.copy_(torch.from_numpy(fixed_table(grid, model.embed_dim, True)))
    return model


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_huge_patch14_224"])
def test_features(name, tmp_path):
    import timm
    import torch
    from networks import randomize

    model = timm.create_model(name, num_classes=0)
    randomize(model, 0)
    sincos(model)
    torch.save({"model": model.state_dict()}, tmp_path / "encoder.pth")
    batch = images(224)
    theirs = ask(model, batch)
    weights = read(tmp_path / "encoder.pth", Hints())
    assert weights.parts == {"encoder"}
    np.testing.assert_allclose(ours(weights, batch), theirs, atol=1e-4)
    del weights

    assert main(["convert", str(tmp_path / "encoder.pth"), str(tmp_path / "out"), "--to=timm"]) == 0
    back = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == name
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(
            back.state_dict()[key].numpy(), tensor.numpy(), atol=0 if key != "pos_embed" else 1e-6
        )
    np.testing.assert_allclose(ask(back, batch), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"model.cls_token": "false"},
        {"image_size": "16,24", "model.patch": "4,8"},
        {"data.channels": "1", "data.mean": "0.3", "data.std": "0.4", "model.mlp_ratio": "2.5"},
    ],
)
def test_own_runs_load_strictly(change, tmp_path, capsys):
    """Grey, without a class token, or rectangles: whatever a run is, timm's is the same function."""
    from seeded import seeded_run

    seeded_run(tmp_path / "run", change)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=timm", "--verify"]) == 0
    assert "verified by timm" in capsys.readouterr().out


def test_patch_kernels_are_resampled_as_timm_does(tmp_path):
    import torch
    from timm.layers import resample_patch_embed

    from maejax.convert.adapt import resample_patches

    kernel = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    for side in (8, 14, 20, 32):
        theirs = resample_patch_embed(torch.from_numpy(kernel), [side, side]).numpy()
        flat = kernel.transpose(2, 3, 1, 0).reshape(-1, 8)
        found = resample_patches(flat, (16, 16), (side, side)).reshape(side, side, 3, 8).transpose(3, 2, 0, 1)
        np.testing.assert_allclose(found, theirs, atol=2e-4)


def test_positions_are_resampled_as_torch_does():
    import torch

    from maejax.convert.adapt import resample_positions

    table = np.random.default_rng(0).standard_normal((1, 1 + 14 * 14, 24)).astype(np.float32)
    grid = torch.from_numpy(table[:, 1:].reshape(1, 14, 14, 24)).permute(0, 3, 1, 2)
    for new in ((16, 16), (7, 7), (10, 21)):
        resized = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
        theirs = resized.permute(0, 2, 3, 1).reshape(1, -1, 24).numpy()
        found = resample_positions(table, (14, 14), new, cls_token=True)
        np.testing.assert_array_equal(found[:, 0], table[:, 0])
        np.testing.assert_allclose(found[:, 1:], theirs, atol=2e-5)
