"""Weights in and out: the same function as other projects', the same bits after a round trip, nothing left over."""

import json
import struct
import subprocess
import sys

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from seeded import seeded, seeded_run

import maejax
from maejax import build
from maejax.cli import main
from maejax.convert import big_vision, facebook, forward, huggingface, onnx, timm
from maejax.convert.infer import Hints
from maejax.convert.names import CONVOLUTION, Layout, Patch, lines
from maejax.convert.read import read
from maejax.convert.verify import NotTheSame, by_numpy, make_probe, verify
from maejax.convert.weights import Weights, facts, network_shapes, of_run
from maejax.errors import UsageError
from maejax.mesh import make_mesh
from maejax.runs import load_objective
from maejax.stored import load_weights, newest_verified
from maejax.tree import named_leaves

TABLES = {
    "timm": timm.TABLE, "timm without key bias": timm.TABLE_WITHOUT_KEY_BIAS, "facebook": facebook.TABLE,
    "huggingface": huggingface.TABLE, "huggingface encoder": huggingface.ENCODER_TABLE, "onnx": onnx.TABLE,
    "big_vision": big_vision.TABLE,
}  # fmt: skip


def hub_folder(folder, size, norm_pix):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(goldens.hub_config(size, norm_pix)))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in goldens.hub(size).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def same(a: Weights, b: Weights):
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


# ---- The same function as other projects' code ----------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("size", ["tiny", "B", "H2"])
def test_answers_of_transformers(size, norm_pix, tmp_path):
    """Loss within 1e-5, reconstruction and features within 1e-4 of what transformers computed (tests/data)."""
    weights = read(hub_folder(tmp_path / "hub", size, norm_pix), Hints())
    ours = goldens.ask_maejax(weights, goldens.images(goldens.SIZES[size][4]), goldens.noise(size))
    stored = np.load(goldens.FILE)
    for name, tolerance in (("loss", 1e-5), ("predictions", 1e-4), ("features", 1e-4)):
        theirs = stored[f"transformers/{size}/{'norm' if norm_pix else 'plain'}/{name}"]
        np.testing.assert_allclose(goldens.sample(ours[name]), theirs, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("size", ["B", pytest.param("H", marks=pytest.mark.slow)])
def test_answers_of_timm(size, tmp_path):
    save_file(
        {n: np.ascontiguousarray(t) for n, t in goldens.official(size, decoder=False).items()}, tmp_path / "x.bin"
    )
    weights = read(tmp_path / "x.bin", Hints())
    ours = goldens.ask_maejax(weights, goldens.images(224), goldens.noise(size))
    stored = np.load(goldens.FILE)[f"timm/{size}/features"]
    np.testing.assert_allclose(goldens.sample(ours["features"]), stored, atol=1e-4, rtol=0)


def test_the_numpy_forward_against_the_stored_answers(tmp_path):
    """So `--verify` without a library is anchored to the library, too."""
    folder = hub_folder(tmp_path / "hub", "tiny", True)
    weights = read(folder, Hints())
    tensors = goldens.hub("tiny")
    f, has = facts(weights), lambda name: name in tensors
    encoder, decoder = (forward.hub(tensors.get, f, has, part) for part in ("", "decoder_"))
    pixels = goldens.normalized(goldens.images(32)).transpose(0, 2, 3, 1)
    order, stored = np.argsort(goldens.noise("tiny"), axis=1), np.load(goldens.FILE)
    patches = forward.cut(pixels, 8, 8)
    found = forward.loss(encoder, decoder, patches, order, 4, True)
    np.testing.assert_allclose(found, stored["transformers/tiny/norm/loss"], atol=1e-5)
    features = goldens.sample(forward.encode(encoder, patches))
    np.testing.assert_allclose(features, stored["transformers/tiny/norm/features"], atol=1e-4)


# ---- Tables of names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_tables_read_both_ways(name):
    """No name twice on their side; every number of ours goes somewhere and comes back from there, once."""
    table = TABLES[name]
    theirs = [rule.theirs for rule in table]
    assert len(set(theirs)) == len(theirs)
    c = seeded().config
    parts = {"encoder", "decoder"} & {rule.ours.split("/")[0] for rule in table}
    shapes = {n: s for n, s in network_shapes(c, parts, 0).items() if n.split("/")[0] in parts}
    arrays = {n: np.arange(np.prod(s), dtype=np.float32).reshape(s) + 1 for n, s in shapes.items()}
    found = lines(table, shapes, Patch(8, 8, 3))
    back = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    for line in found:
        tensor = line.export(arrays, Patch(8, 8, 3))
        assert tensor.shape == line.shape
        line.fill(back, tensor)
    for n, array in arrays.items():
        if "without key bias" in name and n.endswith("qkv/bias"):
            array = array.copy()
            array[:, 1] = 0
        np.testing.assert_array_equal(back[n], array, err_msg=n)


def test_layouts_by_hand():
    """torch's convolution kernel at (d, c, p, q) is our embedding's row p, q, c."""
    ours = np.arange(2 * 3 * 4 * 5).reshape(2 * 3 * 4, 5)
    theirs = CONVOLUTION.export(ours, Patch(2, 3, 4))
    assert theirs.shape == (5, 4, 2, 3) and theirs[3, 2, 1, 0] == ours[(1 * 3 + 0) * 4 + 2, 3]
    assert isinstance(CONVOLUTION, Layout)


def test_the_official_names_of_b16():
    """254 tensors with the decoder, as the official full file has, 150 of them without."""
    c = read_config({"model.size": "B", "image_size": "224", "model.patch": "16", "decoder.width": "512",
                     "decoder.depth": "8", "decoder.heads": "16"})  # fmt: skip
    found = {
        line.theirs: line.shape for line in lines(facebook.TABLE, network_shapes(c, {"decoder"}, 0), Patch(16, 16, 3))
    }
    assert len(found) == 254 and sum(not n.startswith(("decoder_", "mask_token")) for n in found) == 150
    assert found["pos_embed"] == (1, 197, 768) and found["patch_embed.proj.weight"] == (768, 3, 16, 16)
    assert found["blocks.11.attn.qkv.weight"] == (2304, 768) and found["decoder_pred.weight"] == (768, 512)
    assert found["decoder_blocks.7.mlp.fc1.weight"] == (2048, 512) and found["mask_token"] == (1, 1, 512)


def read_config(changes):
    from seeded import TINY

    from maejax import config as configs
    from maejax.overrides import override

    keys = TINY | changes
    if "model.width" not in changes:
        keys = {key: value for key, value in keys.items() if key not in ("model.width", "model.depth", "model.heads")}
    return override(configs.default(), keys)


# ---- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["huggingface", "facebook", "safetensors"])
@pytest.mark.parametrize(
    "change", [{}, {"norm_pix": "false", "data.channels": "1", "data.mean": "0.3", "data.std": "0.4"}]
)
def test_there_and_back_bitwise(format, change, tmp_path, capsys):
    weights = seeded_run(tmp_path / "run", change)
    run, out, back = (str(tmp_path / name) for name in ("run", "out", "back"))
    assert main(["convert", run, out, f"--to={format}"]) == 0
    assert main(["convert", out, back]) == 0
    again = of_run(tmp_path / "back")
    same(weights, again)
    assert again.config.to_dict() == weights.config.to_dict()
    printed = capsys.readouterr().out
    counts = [line.split()[1].split("/") for line in printed.splitlines() if line.startswith("mapped")]
    assert len(counts) == 2 and counts[0] == counts[1] and counts[0][0] == counts[0][1]


@pytest.mark.parametrize("format", ["timm", "big_vision", "huggingface", "facebook", "safetensors"])
def test_the_encoder_there_and_back_bitwise(format, tmp_path):
    """Without the file's own notes, too: other tools do not keep them."""
    weights = seeded_run(tmp_path / "run")
    arguments = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), f"--to={format}", "--encoder-only"]
    assert main(arguments) == 0
    file = tmp_path / "out" / "model.safetensors"
    if file.exists() and format != "safetensors":
        save_file(load_file(file), file)
    again = read(tmp_path / "out", Hints(image_size=(32,), heads=4))
    assert again.parts == {"encoder"}
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(array, weights.arrays[name], err_msg=name)


def test_rectangles_and_no_class_token(tmp_path, capsys):
    change = {"image_size": "16,24", "model.patch": "4,8", "model.cls_token": "false"}
    weights = seeded_run(tmp_path / "run", change)
    for format in ("timm", "safetensors", "big_vision"):
        assert main(["convert", str(tmp_path / "run"), str(tmp_path / format), f"--to={format}", "--verify"]) == 0
        assert "verified by" in capsys.readouterr().out
        again = read(tmp_path / format, Hints(image_size=(16, 24)))
        np.testing.assert_array_equal(again.arrays["encoder/embed/kernel"], weights.arrays["encoder/embed/kernel"])
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "no"), "--to=facebook"]) == 2
    assert "encoder/cls_token is missing" in capsys.readouterr().err


def test_key_bias_free_files(tmp_path):
    """The TPU originals have no key bias; it is zero."""
    tensors = goldens.official("tiny")
    for name in [name for name in tensors if name.endswith("attn.qkv.bias")]:
        q, k, v = np.split(tensors.pop(name), 3)
        tensors[name.replace("qkv.bias", "q_bias")], tensors[name.replace("qkv.bias", "v_bias")] = q, v
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "x.safetensors")
    weights = read(tmp_path / "x.safetensors", Hints(norm_pix=True, heads=4, decoder_heads=4))
    bias = weights.arrays["encoder/blocks/block/attn/qkv/bias"]
    assert not bias[:, 1].any() and bias[:, 0].any() and bias[:, 2].any()
    assert "verified" not in verify(weights, tmp_path / "x.safetensors", "facebook")


def fine_tuned():
    """As the official mae_finetuned files are: no norm, but fc_norm and a head; the table was trained, too."""
    tensors = goldens.official("tiny", decoder=False)
    rng = np.random.default_rng(5)
    tensors["fc_norm.weight"], tensors["fc_norm.bias"] = tensors.pop("norm.weight"), tensors.pop("norm.bias")
    tensors["head.weight"] = rng.standard_normal((10, 48), dtype=np.float32)
    tensors["head.bias"] = rng.standard_normal(10, dtype=np.float32)
    tensors["pos_embed"] = tensors["pos_embed"] + 0.1 * rng.standard_normal((1, 17, 48), dtype=np.float32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_fine_tuned_files(pool, tmp_path):
    """A classifier's logits, by the independent forward; and the encoder, with its trained table, to timm and back."""
    tensors = fine_tuned()
    if pool == "cls":
        tensors["norm.weight"], tensors["norm.bias"] = tensors.pop("fc_norm.weight"), tensors.pop("fc_norm.bias")
    save_file(tensors, tmp_path / "mae_finetuned_vit_base.pth")
    assert main(["convert", str(tmp_path / "mae_finetuned_vit_base.pth"), str(tmp_path / "run"), "--heads=4"]) == 0
    c, objective, params = load_objective(tmp_path / "run")
    assert (c.objective, c.finetune.pool, c.finetune.num_classes) == ("classify", pool, 10)
    assert c.model.positions == "learned"
    pixels = goldens.normalized(goldens.images(32)).transpose(0, 2, 3, 1)
    logits = objective.apply({"params": params}, pixels, method="logits")
    f = facts(of_run(tmp_path / "run"))
    tokens = forward.encode(forward.official(tensors.get, f, lambda n: n in tensors), forward.cut(pixels, 8, 8))
    if pool == "mean":
        x = forward.layer_norm(tokens[:, 1:].mean(1), tensors["fc_norm.weight"], tensors["fc_norm.bias"])
    else:
        x = tokens[:, 0]
    np.testing.assert_allclose(logits, x @ tensors["head.weight"].T + tensors["head.bias"], atol=1e-4)
    for format in ("timm", "facebook", "safetensors"):
        out = tmp_path / format
        assert main(["convert", str(tmp_path / "run"), str(out), f"--to={format}", "--verify"]) == 0
        same(of_run(tmp_path / "run"), read(out, Hints(heads=4)))
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["num_classes"] == 10


def test_learned_positions(tmp_path):
    """A table that is not the sine-cosine one is kept, bit for bit, and is what the encoder adds."""
    tensors = goldens.official("tiny", decoder=False)
    tensors["pos_embed"] = np.random.default_rng(1).standard_normal((1, 17, 48), dtype=np.float32)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "x.safetensors")
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "run"), "--heads=4", "--verify"]) == 0
    weights = of_run(tmp_path / "run")
    assert weights.config.model.positions == "learned"
    np.testing.assert_array_equal(weights.arrays["encoder/pos_embed"], tensors["pos_embed"])
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "bv"), "--to=big_vision"]) == 2


# ---- Proof ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["timm", "huggingface", "facebook", "safetensors", "big_vision"])
def test_numpy_agrees_and_notices(format, tmp_path):
    """The independent forward gives the same answer, and another one once a single tensor has changed."""
    weights = seeded_run(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), f"--to={format}"]) == 0
    probe, known = make_probe(weights), facts(weights)
    from maejax.convert.verify import answer

    ours, theirs = answer(weights, probe), by_numpy(tmp_path / "out", format, known, probe)
    np.testing.assert_allclose(ours.features, theirs.features, atol=1e-5)
    if theirs.loss is not None:
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    swapped = dict(weights.arrays)
    swapped["encoder/blocks/block/attn/qkv/kernel"] = swapped["encoder/blocks/block/attn/qkv/kernel"][:, :, [1, 0, 2]]
    with pytest.raises(NotTheSame, match="not the same network"):
        file = tmp_path / "out" / ("model.npz" if format == "big_vision" else "model.safetensors")
        verify(Weights(weights.config, swapped, weights.origin), file, format)


def test_a_failed_proof_leaves_nothing(tmp_path, monkeypatch, capsys):
    from maejax.convert import timm as module

    seeded_run(tmp_path / "run")
    wrong = [module.Rule(r.theirs, r.ours.replace("norm1", "norm3").replace("norm2", "norm1").replace("norm3", "norm2"),
             r.layout) for r in module.TABLE]  # fmt: skip
    monkeypatch.setattr(module, "TABLE", wrong)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=timm", "--verify"]) == 1
    assert "is not the same network" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_onnx_runs(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `make interop` installs it")
    pytest.importorskip("onnx")
    weights = seeded_run(tmp_path / "run", {"image_size": "16,24", "model.patch": "4,8"})
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=onnx", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "mapped 42/42 tensors" in printed and "verified by onnxruntime" in printed
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((5, 16, 24, 3)).astype(np.float32)  # any batch
    (tokens,) = session.run(None, {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
    encoder = build.make_objective(weights.config).encoder
    ours = encoder.apply({"params": weights.tree["encoder"]}, pixels)
    np.testing.assert_allclose(tokens, ours, atol=1e-5)


# ---- What a run is, and what follows --------------------------------------------------------------------------------


def test_encoder_alone_is_a_run_without_decoder(tmp_path, capsys):
    """`reconstruct` says so, `--from` starts a new decoder and says so; the encoder's weights are there."""
    seeded_run(tmp_path / "first")
    first, out, run, following = (str(tmp_path / name) for name in ("first", "out", "run", "next"))
    assert main(["convert", first, out, "--to=timm"]) == 0
    assert main(["convert", out, run]) == 0
    assert main(["reconstruct", run, f"--out={tmp_path / 'x.png'}"]) == 2
    assert "holds no decoder, only encoder" in capsys.readouterr().err
    train = ["pretrain", "digits", f"--workdir={following}", f"--from={run}", "--config.total_steps=1",
             "--config.warmup_steps=0", "--config.base_lr=1e-30", "--config.batch_size=8", "--config.tensorboard=false",
             "--config.data.workers=0", "--config.picture_steps=100",
             "--config.evals=none", "--config.sharding=replicate"]  # fmt: skip
    from seeded import TINY

    keys = [f"--config.{key}={value}" for key, value in TINY.items() if key != "total_steps"]
    assert main([*train, *keys, "--config.data.channels=3"]) == 0
    assert "17 of 36 arrays; new: decoder" in capsys.readouterr().out
    (_, a), (_, b) = maejax.load_encoder(run), maejax.load_encoder(following)
    np.testing.assert_array_equal(a["embed"]["kernel"], b["embed"]["kernel"])


def test_the_licence_travels(tmp_path, capsys):
    """From an official file's name into the run, from there into a run that starts from it, and into model cards."""
    file = tmp_path / "mae_visualize_vit_base.pth"  # a name is all it needs; the container does not matter
    save_file({n: np.ascontiguousarray(t) for n, t in goldens.official("tiny").items()}, file)
    run = str(tmp_path / "run")
    assert main(["convert", str(file), run, "--heads=4", "--decoder-heads=4"]) == 0
    printed = capsys.readouterr().out
    assert "norm_pix=False, by the file's name" in printed and "licence of the weights: cc-by-nc-4.0" in printed
    assert main(["convert", run, str(tmp_path / "out"), "--to=huggingface"]) == 0
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: cc-by-nc-4.0\n")
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.count("licence of the weights: cc-by-nc-4.0") == 2
    assert main(["convert", run, str(tmp_path / "timm"), "--to=timm"]) == 0
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


def test_large_weights_load_onto_their_shards(tmp_path):
    """Every device gets its part of an imported network, and no device more."""
    weights = seeded_run(tmp_path / "run", {"model.width": "64"})
    mesh = make_mesh({"dcn_data": 1, "data": 1, "fsdp": 8, "tensor": 1})
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split) for name, a in weights.arrays.items()
              if name.endswith("mlp/fc1/kernel")}  # fmt: skip
    from flax.traverse_util import unflatten_dict

    loaded = named_leaves(load_weights(newest_verified(tmp_path / "run"), unflatten_dict(shapes, sep="/")))
    assert len(loaded) == 2
    for name, leaf in loaded.items():
        assert leaf.sharding == split
        assert all(shard.data.nbytes == leaf.nbytes // 8 for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(leaf, weights.arrays[name])


# ---- From Python ----------------------------------------------------------------------------------------------------


def test_load_encoder_from_anything(tmp_path):
    weights = seeded_run(tmp_path / "run")
    batch = goldens.images(32)
    encoder, params = maejax.load_encoder(tmp_path / "run")
    tokens = encoder.apply({"params": params}, batch)
    assert tokens.shape == (2, 17, 48)
    np.testing.assert_array_equal(tokens, encoder.apply({"params": params}, batch))
    for format in ("timm", "huggingface", "facebook", "safetensors"):
        assert main(["convert", str(tmp_path / "run"), str(tmp_path / format), f"--to={format}"]) == 0
        other, found = maejax.load_encoder(str(tmp_path / format))
        np.testing.assert_array_equal(other.apply({"params": found}, batch), tokens)
    pooled, params = maejax.load_encoder(tmp_path / "run", pool="cls")
    np.testing.assert_array_equal(pooled.apply({"params": params}, batch), tokens[:, 0])
    pooled, params = maejax.load_encoder(tmp_path / "timm", pool="mean")
    np.testing.assert_allclose(pooled.apply({"params": params}, batch), tokens[:, 1:].mean(1), rtol=1e-6, atol=1e-6)
    assert facts(weights)["cls_token"]
    with pytest.raises(UsageError, match="pool='max'"):
        maejax.load_encoder(tmp_path / "run", pool="max")
    with pytest.raises(UsageError, match="blocks 0 to 2"):
        maejax.load_encoder(tmp_path / "run", layers=(3,))


def test_load_encoder_for_other_channels_and_patches(tmp_path):
    """A grey image gives a colour encoder's token of the same grey; a patch twice as large that of the small image."""
    seeded_run(tmp_path / "run")
    encoder, params = maejax.load_encoder(tmp_path / "run")
    grey = np.random.default_rng(0).standard_normal((2, 32, 32, 1)).astype(np.float32)
    tokens = encoder.apply({"params": params}, grey.repeat(3, axis=3))
    one, found = maejax.load_encoder(tmp_path / "run", channels=1)
    np.testing.assert_allclose(one.apply({"params": found}, grey), tokens, atol=2e-5)
    five, found = maejax.load_encoder(tmp_path / "run", channels=5)
    assert five.apply({"params": found}, grey.repeat(5, axis=3)).shape == tokens.shape
    # A smooth image, enlarged without loss: with patches of 16 of the same token.
    large, found = maejax.load_encoder(tmp_path / "run", image_size=64, patch=16)
    flat = np.broadcast_to(np.float32([0.3, -0.2, 0.9]), (1, 32, 32, 3))
    np.testing.assert_allclose(
        large.apply({"params": found}, flat.repeat(2, 1).repeat(2, 2)),
        encoder.apply({"params": params}, flat),
        atol=1e-4,
    )
    assert jnp.isfinite(tokens).all()


def test_load_encoder_for_another_size(tmp_path):
    """A rectangle: the table of the training grid resampled (torch's bicubic: see tests/interop), cls row kept."""
    from maejax.convert.adapt import resample_positions

    seeded_run(tmp_path / "run")
    encoder, params = maejax.load_encoder(tmp_path / "run", image_size=(48, 64))
    assert encoder.positions == "learned" and params["pos_embed"].shape == (1, 1 + 6 * 8, 48)
    expected = resample_positions(goldens.table("tiny", 48), (4, 4), (6, 8), cls_token=True)
    np.testing.assert_allclose(params["pos_embed"], expected, atol=1e-6)
    assert encoder.apply({"params": params}, np.zeros((1, 48, 64, 3), np.uint8)).shape == (1, 49, 48)
    encoder, params = maejax.load_encoder(tmp_path / "run", patch=16)
    assert encoder.apply({"params": params}, np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 5, 48)


def test_layers_inside(tmp_path):
    """The last block's output, normalised, is what the encoder returns; a shorter encoder's is that of its block."""
    weights = seeded_run(tmp_path / "run")
    batch = goldens.images(32)
    tokens = np.asarray((loaded := maejax.load_encoder(tmp_path / "run"))[0].apply({"params": loaded[1]}, batch))
    encoder, params = maejax.load_encoder(tmp_path / "run", layers=(1, -1))
    inside = np.asarray(encoder.apply({"params": params}, batch))
    assert inside.shape == (2, 2, 17, 48)
    scale, bias = (weights.arrays[f"encoder/norm/{name}"] for name in ("scale", "bias"))
    np.testing.assert_allclose(forward.layer_norm(inside[1], scale, bias), tokens, atol=1e-5)
    short, _ = loaded
    cut = dict(params) | {"blocks": {"block": jax.tree.map(lambda x: x[:2], params["blocks"]["block"])}}
    after_two = short.clone(depth=2, norm=False).apply({"params": cut}, batch)
    np.testing.assert_allclose(inside[0], after_two, atol=1e-5)
    encoder, params = maejax.load_encoder(tmp_path / "run", layers=(0, 1, 2), pool="mean")
    assert encoder.apply({"params": params}, batch).shape == (3, 2, 48)


MEASURE = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
from maejax.cli import main
import maejax.encoder, maejax.convert.write, maejax.convert.verify
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(peak() - before)
"""


@pytest.mark.slow
def test_vit_h_needs_little_memory(tmp_path):
    """At most 2.2 times its size on the host, out and in again."""
    change = {"model.size": "H", "model.width": "1280", "model.depth": "32", "model.heads": "16", "model.patch": "14",
              "image_size": "224", "decoder.width": "512", "decoder.depth": "8", "decoder.heads": "16"}  # fmt: skip
    size = sum(array.nbytes for array in seeded_run(tmp_path / "run", change).arrays.values())
    assert size > 2.6e9
    for arguments in (
        ["run", "out", "--to=huggingface"],
        ["out", "back"],
        ["out/model.safetensors", "again", "--norm-pix"],
    ):
        paths = [str(tmp_path / name) for name in arguments[:2]]
        command = [sys.executable, "-c", MEASURE, *paths, *arguments[2:]]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        taken = int(printed.split()[-1])
        print(f"{arguments}: {taken / size:.2f}x")
        assert taken < 2.2 * size, f"{arguments}: {taken / size:.2f}x"


def test_safetensors_are_those_of_the_library(tmp_path):
    """What is written here, the safetensors package reads, and the other way round."""
    weights = seeded_run(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to=safetensors"]) == 0
    file = tmp_path / "out" / "model.safetensors"
    for name, array in load_file(file).items():
        np.testing.assert_array_equal(array, weights.arrays[name])
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert length % 8 == 0
