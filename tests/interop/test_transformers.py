"""Against `transformers.ViTMAEForPreTraining` and `ViTModel`, in both directions, under the same mask."""

import numpy as np
import pytest
from goldens import SIZES, ask_maejax, images, normalized
from goldens import noise as make_noise

from maejax.cli import main
from maejax.convert.infer import Hints
from maejax.convert.read import read
from maejax.convert.weights import of_run

CASES = [
    pytest.param("tiny", None, True, id="tiny-norm"),
    pytest.param("tiny", None, False, id="tiny"),
    pytest.param("B", None, True, id="B16-norm"),
    pytest.param("B", None, False, id="B16"),
    pytest.param("H", 2, True, id="H14-2-blocks-norm"),
    pytest.param("H", 2, False, id="H14-2-blocks"),
    pytest.param("H", None, True, id="H14-norm", marks=pytest.mark.slow),
    pytest.param("H", None, False, id="H14", marks=pytest.mark.slow),
]


def close(theirs, ours):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], atol=1e-5)
    there = np.take_along_axis(theirs["predictions"], ours["masked"][:, :, None], axis=1)
    np.testing.assert_allclose(ours["predictions"], there, atol=1e-4)
    np.testing.assert_allclose(ours["features"], theirs["features"], atol=1e-4)


@pytest.mark.parametrize(("size", "depth", "norm_pix"), CASES)
def test_both_directions(size, depth, norm_pix, tmp_path):
    from networks import ask_vit_mae, vit_mae
    from transformers import ViTMAEForPreTraining

    model = vit_mae(size, norm_pix=norm_pix, depth=depth)
    batch, noise = images(SIZES[size][4]), make_noise(size)
    theirs = ask_vit_mae(model, batch, noise)
    model.save_pretrained(tmp_path / "hf")

    weights = read(tmp_path / "hf", Hints())  # in
    assert weights.config.norm_pix == norm_pix
    ours = ask_maejax(weights, batch, noise)
    close(theirs, ours)

    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0  # and out again
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=huggingface"]) == 0
    back, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.config.layer_norm_eps == 1e-6 and back.config.norm_pix_loss == norm_pix
    # Converting is no arithmetic: the very same bits, and so the same function.
    for name, tensor in model.state_dict().items():
        if "position_embeddings" in name or "decoder_pos_embed" in name:
            np.testing.assert_allclose(back.state_dict()[name].numpy(), tensor.numpy(), atol=1e-6)
        else:
            assert (back.state_dict()[name] == tensor).all(), name
    close(ask_vit_mae(back.eval(), batch, noise), ours)


def test_the_three_spellings_are_the_same_weights(tmp_path):
    from networks import vit_mae
    from safetensors.numpy import load_file, save_file

    model = vit_mae("tiny", norm_pix=True)
    model.save_pretrained(tmp_path / "saved")
    as_modules = tmp_path / "modules"
    as_modules.mkdir()
    (as_modules / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    save_file({n: t.numpy() for n, t in model.state_dict().items()}, as_modules / "model.safetensors")
    first = read(tmp_path / "saved", Hints())
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "hub"), "--to=huggingface"]) == 0
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    assert "decoder.decoder_layers.1.attention.attention.query.weight" in hub  # as the hub's own files have it
    for folder in (as_modules, tmp_path / "hub"):
        weights = read(folder, Hints())
        assert weights.arrays.keys() == first.arrays.keys()
        for name, array in first.arrays.items():
            np.testing.assert_array_equal(array, weights.arrays[name])


def test_pytorch_bin_and_eps(tmp_path):
    import torch
    from networks import vit_mae

    model = vit_mae("tiny", norm_pix=False)
    model.config.layer_norm_eps = 1e-12
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights = read(tmp_path, Hints())
    assert any("1e-12" in note for note in weights.notes)


@pytest.mark.parametrize("size", ["tiny", "B"])
def test_encoder_only_is_a_plain_vit(size, tmp_path):
    import torch
    from networks import vit_mae
    from transformers import ViTModel

    vit_mae(size, norm_pix=True).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "vit"), "--to=huggingface", "--encoder-only"]) == 0
    model, report = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = images(SIZES[size][4])
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(normalized(batch))).last_hidden_state.numpy()
    ours = ask_maejax(of_run(tmp_path / "run"), batch, make_noise(size))
    np.testing.assert_allclose(ours["features"], theirs, atol=1e-4)


def test_verify_uses_the_library(tmp_path, capsys):
    from networks import vit_mae

    vit_mae("tiny", norm_pix=True).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run"), "--verify"]) == 0
    assert "verified by transformers" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["tiny", "H2"])
def test_stored_answers_are_what_the_library_computes(size):
    import goldens
    from make_goldens import transformers_answers

    stored = np.load(goldens.FILE)
    for name, array in transformers_answers(size, True).items():
        np.testing.assert_allclose(stored[f"transformers/{size}/norm/{name}"], goldens.sample(array), atol=1e-5)
