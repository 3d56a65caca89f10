"""Files that are damaged, mixed up or malicious: one line that names the tensor or file, exit code 2, nothing written,
nothing run, and no more memory than the file has bytes."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import goldens
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seeded import seeded_run

from maejax.cli import main
from maejax.convert import files
from maejax.convert.unpickle import BadFile, run


@pytest.fixture
def tensors():
    return {name: np.ascontiguousarray(tensor) for name, tensor in goldens.official("tiny").items()}


HINTS = ("--heads=4", "--decoder-heads=4", "--norm-pix")


def refused(capsys, source, *texts, arguments=HINTS, out="out", allowed=16 * 2**20):
    """Converting `source` ends with one line that has all `texts`, exit code 2, and no trace but the source."""
    folder = source.parent
    before = sorted(path for path in folder.rglob("*"))
    tracemalloc.start()
    try:
        code = main(["convert", str(source), str(folder / out), *arguments])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.err.count("\n") == 1 and printed.err.startswith("maejax: "), printed.err
    for text in texts:
        assert text in printed.err, printed.err
    assert sorted(path for path in folder.rglob("*")) == before
    assert peak < allowed, f"{peak:,} bytes"


def test_the_file_itself_is_fine(tensors, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), *HINTS]) == 0


def _without(t):
    del t["blocks.1.mlp.fc2.bias"]


def _extra(t):
    t["blocks.1.gamma_1"] = np.zeros(48, np.float32)


def _shape(t):
    t["blocks.2.attn.proj.weight"] = np.zeros((48, 47), np.float32)


def _integers(t):
    t["norm.weight"] = np.zeros(48, np.int64)


def _doubles(t):
    t["decoder_norm.bias"] = np.zeros(32, np.float64)


def _mixed(t):
    t |= {name: tensor for name, tensor in goldens.hub("tiny").items() if "layer.0" in name}


def _of_another_size(t):
    big = goldens.official("B")
    t["blocks.1.norm1.weight"] = big["blocks.1.norm1.weight"]


def _other_table(t):
    t["decoder_pos_embed"] = np.zeros_like(t["decoder_pos_embed"])


def _gap_in_blocks(t):
    for name in [name for name in t if name.startswith("blocks.1.")]:
        t[name.replace("blocks.1.", "blocks.7.")] = t.pop(name)


def _rectangle(t):
    t["pos_embed"] = t["pos_embed"][:, :-1]


def _deep(t):
    t["blocks.99999.norm1.bias"] = np.zeros(48, np.float32)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (_without, ["tensor blocks.1.mlp.fc2.bias is missing"]),
        (_extra, ["tensor blocks.1.gamma_1 is left over"]),
        (_shape, ["tensor blocks.2.attn.proj.weight has shape (48, 47), expected (48, 48)"]),
        (_integers, ["tensor norm.weight is int64, expected float32"]),
        (_doubles, ["tensor decoder_norm.bias is float64"]),
        (_mixed, ["x.safetensors", "tensor "]),
        (_of_another_size, ["tensor blocks.1.norm1.weight has shape (768,), expected (48,)"]),
        (_other_table, ["tensor decoder_pos_embed is not the fixed sine-cosine table", "all zeros"]),
        (_gap_in_blocks, ["block 1 of the encoder is missing, blocks.7 is there"]),
        (_rectangle, ["pos_embed has 15 places", "--image-size"]),
        (_deep, ["block 3 of the encoder is missing, blocks.99999 is there"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_tensors_that_do_not_fit(change, texts, container, tensors, tmp_path, capsys):
    change(tensors)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    file = tmp_path / f"x.{container}"
    if container == "npz":
        np.savez(file, **tensors)
        texts = [text.replace("x.safetensors", "x.npz") for text in texts]
    else:
        save_file(tensors, file)
    refused(capsys, file, *texts)


# ---- Pickles --------------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled by anything that runs pickles."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def as_pth(path, program: bytes, storages: dict[str, bytes] | None = None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("where", ["whole", "value", "key", "inside a list"])
def test_payloads_never_run(protocol, where, tmp_path, capsys):
    canary = tmp_path / "canary"
    bomb = Payload(canary)
    content = {
        "whole": bomb,
        "value": {"model": {}, "args": bomb},
        "key": {"model": (bomb, 1)},
        "inside a list": [bomb],
    }
    file = as_pth(tmp_path / "x.pth", pickle.dumps(content[where], protocol))
    refused(capsys, file, "x.pth", "")
    assert not canary.exists()
    legacy = tmp_path / "y.pth"
    legacy.write_bytes(pickle.dumps(content[where], max(protocol, 2)))
    refused(capsys, legacy, "y.pth", "system, which is refused", out="out2")
    assert not canary.exists()
    pickle.loads(pickle.dumps(bomb))  # the payload itself is sound
    assert canary.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "torch._utils _rebuild_tensor", "argparse Namespace"])
def test_names_are_refused_by_name(name):
    module, attribute = name.split()
    for program in (
        f"c{module}\n{attribute}\n)R.".encode(),
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, attribute)) + b"\x93)R.",
    ):
        with pytest.raises(BadFile, match=f"{module}.{attribute}, which is refused"):
            run(io.BytesIO(program))


@pytest.mark.parametrize(
    "program",
    [
        b"", b"\x80", b"\x80\x02}q\x00X\xff\xff\xff\xffa.", b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02r\xff\xff\xff\x7f.", b"h\x05.", b"0.", b"(((.",
        b"\x80\x04\x8c\x02os\x940\x8c\x06system\x94h\x00h\x01\x93.", b"}(KaKb.", b"]}a}K\x01s.", b"\x80\x02(lp0\n(((t.",
        b"}" + b"\x85" * 1000 + b"K\x01s.", b"}]K\x01s.", b"K" * 2,
    ],
)  # fmt: skip
def test_nonsense_is_refused(program):
    tracemalloc.start()
    with pytest.raises(BadFile):
        run(io.BytesIO(program))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def tensor_program(shape=(2, 3), strides=(3, 1), numel=6, offset=0, key="0", type_name="FloatStorage"):
    """The pickle that torch.save writes for {"a": one tensor}, by hand."""
    out = io.BytesIO()

    class Name:
        def __init__(self, module, name):
            self.module, self.name = module, name

    class Writer(pickle._Pickler):  # the one in Python, whose parts can be replaced
        def persistent_id(self, value):
            return (
                ("storage", value[1], key, "cpu", numel) if isinstance(value, tuple) and value[:1] == ("s",) else None
            )

        def save(self, value, save_persistent_id=True):
            if isinstance(value, Name):
                self.write(f"c{value.module}\n{value.name}\n".encode())
            elif isinstance(value, list) and value[:1] == ["rebuild"]:
                self.save(Name("torch._utils", "_rebuild_tensor_v2"))
                self.save(tuple(value[1:]))
                self.write(b"R")
            else:
                super().save(value, save_persistent_id)

    storage = ("s", Name("torch", type_name))
    Writer(out, 2).dump({"a": ["rebuild", storage, offset, shape, strides, False, {}]})
    return out.getvalue()


def test_a_tensor_by_hand(tmp_path):
    raw = np.arange(6, dtype=np.float32)
    tensors, _ = files.open_tensors(as_pth(tmp_path / "x.pth", tensor_program(), {"0": raw.tobytes()}))
    np.testing.assert_array_equal(tensors["a"].read(), raw.reshape(2, 3))
    program = tensor_program((3, 2), (1, 3))
    tensors, _ = files.open_tensors(as_pth(tmp_path / "x.pth", program, {"0": raw.tobytes()}))
    np.testing.assert_array_equal(tensors["a"].read(), raw.reshape(2, 3).T)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (10**9, 10**9), "strides": (0, 0)}, {"shape": (2, 30), "strides": (3, 1)}, {"offset": 1},
        {"numel": 10**12}, {"strides": (10**6, 1)}, {"shape": (2, -3)}, {"strides": (3, -1)}, {"key": "../../x"},
        {"shape": (2, 3, 1)}, {"type_name": "QInt8Storage"}, {"key": "1"}, {"offset": -4}, {"numel": True},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_lie(lie, tmp_path, capsys):
    file = as_pth(tmp_path / "x.pth", tensor_program(**lie), {"0": np.zeros(6, np.float32).tobytes()})
    refused(capsys, file, "x.pth")


def test_zip_bombs_and_cut_files(tensors, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program(numel=10**8, shape=(10**8,), strides=(1,)))
        archive.writestr("archive/data/0", bytes(4 * 10**8))
    refused(capsys, tmp_path / "x.pth", "archive/data.pkl is compressed")
    np.savez_compressed(tmp_path / "y.npz", a=np.zeros(10**7))
    refused(capsys, tmp_path / "y.npz", "a.npy is compressed")
    whole = as_pth(tmp_path / "w.pth", tensor_program(), {"0": bytes(24)}).read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 4):
        (tmp_path / "z.pth").write_bytes(whole[:length])
        refused(capsys, tmp_path / "z.pth", "z.pth")
    flipped = bytearray(whole)
    flipped[whole.index(bytes(24)) + 3] ^= 1  # a value: zip files have checksums
    (tmp_path / "f.pth").write_bytes(flipped)
    with pytest.raises(Exception, match="tensor a cannot be read: Bad CRC"):
        found, _ = files.open_tensors(tmp_path / "f.pth")
        files.read(tmp_path / "f.pth", "a", found["a"])


# ---- safetensors and npz --------------------------------------------------------------------------------------------


def raw_safetensors(header, data=bytes(24)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape=(2, 3), begin=0, end=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "its header claims"),
        (struct.pack("<Q", 2**40) + b"{" * 9, "its header claims"),
        (raw_safetensors({"a": entry((10**9, 10**9))}), "tensor a has shape"),
        (raw_safetensors({"a": entry(end=10**15, shape=(25 * 10**13,))}), "its tensors claim 1,000,000,000,000,"),
        (raw_safetensors({"a": entry(), "b": entry()}), "tensors overlap"),
        (raw_safetensors({"a": entry((2, 2), 8, 24)}), "leave a gap"),
        (raw_safetensors({"a": entry((-2, -3))}), "tensor a has an entry that cannot be understood"),
        (raw_safetensors({"a": entry(dtype="F8")}), "tensor a has an entry"),
        (raw_safetensors({"a": 3}), "tensor a has an entry"),
        (raw_safetensors({"a": entry((2, True))}), "tensor a has an entry"),
        (raw_safetensors(b'{"a": {}, "a": {}}'), "a is there twice"),
        (raw_safetensors(b"{" * 100_000), "its header is not JSON"),
        (raw_safetensors(b'{"a": \xff}'), "its header is not JSON"),
        (raw_safetensors({"a": entry()}, bytes(20)), "its tensors claim 24 bytes, the file holds 20"),
        (raw_safetensors({"a": entry()}), "names of no known format"),
        (raw_safetensors({}, b""), "its 0 tensors"),
        (b"", "no .safetensors, .npz or .pth file"), (b"hello there, this is text", "no .safetensors"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
    ],
    ids=range(19),
)  # fmt: skip
def test_lying_headers(content, text, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(capsys, tmp_path / "x.safetensors", "x.safetensors", text)


def test_npz_of_objects_and_lying_npz(tmp_path, capsys):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "x.npz", a=np.array([Payload(canary)], dtype=object))
    refused(capsys, tmp_path / "x.npz", "a.npy holds Python objects")
    assert not canary.exists()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("a.npy", head.getvalue() + bytes(100))
    refused(capsys, tmp_path / "y.npz", "a.npy claims shape (1000000, 1000000)")


# ---- Folders and commands -------------------------------------------------------------------------------------------


def test_mistakes_of_people(tensors, tmp_path, capsys):
    run = tmp_path / "run"
    seeded_run(run)
    refused(capsys, run, "is a run already", "--to=timm", arguments=())
    refused(capsys, run, "--to='tim' is not one of timm, huggingface", "did you mean timm?", arguments=("--to=tim",))
    refused(capsys, tmp_path / "nothing", "nothing does not exist", arguments=())
    refused(capsys, run, "are for weights from elsewhere", arguments=("--to=timm", "--no-norm-pix"))
    refused(capsys, run, "run is not empty", arguments=("--to=timm",), out="run")
    refused(capsys, run, "config.json is a file", arguments=("--to=timm",), out="run/config.json")
    refused(capsys, run, "--image-size=2x", arguments=("--to=timm", "--image-size=2x"))
    (tmp_path / "empty").mkdir()
    refused(
        capsys, tmp_path / "empty", "empty is not a run of maejax and holds none of model.safetensors", arguments=()
    )
    save_file(tensors, tmp_path / "x.safetensors")
    refused(capsys, tmp_path / "x.safetensors", "does not say whether", "--norm-pix", arguments=HINTS[:2])
    refused(capsys, tmp_path / "x.safetensors", "width 48", "--heads=N", arguments=HINTS[2:])
    refused(capsys, tmp_path / "x.safetensors", "48", arguments=("--heads=5", *HINTS[1:]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(capsys, tmp_path / "broken", "broken", arguments=())


def test_folders_whose_files_disagree(tmp_path, capsys):
    """A config of one network beside the weights of another; a config whose values are of another kind."""
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({n: np.ascontiguousarray(t) for n, t in goldens.hub("tiny").items()}, folder / "model.safetensors")
    good = goldens.hub_config("tiny", True)
    for change, texts in (
        ({"image_size": 64}, ["position_embeddings has 16 places", "64x64"]),
        ({"num_attention_heads": 7}, ["48"]),
        ({"num_attention_heads": "4"}, ["num_attention_heads='4' makes no sense"]),
        ({"image_size": [32, 0]}, ["image_size=[32, 0] makes no sense"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act='gelu_new'"]),
        ({"model_type": "deit"}, ["model_type='deit'"]),
        ({"mask_ratio": 1.5}, ["mask.ratio=1.5"]),
        ({"norm_pix_loss": "yes"}, ["norm_pix_loss='yes' makes no sense"]),
    ):
        (folder / "config.json").write_text(json.dumps(good | change))
        refused(capsys, folder, *texts, arguments=())
    (folder / "config.json").write_text("[1]")
    refused(capsys, folder, "config.json", arguments=())


def test_a_damaged_own_file(tmp_path, capsys):
    """The config in the header of our own files is not trusted either: shapes must agree with it."""
    seeded_run(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "own"), "--to=safetensors"]) == 0
    capsys.readouterr()
    file = tmp_path / "own" / "model.safetensors"
    arrays = load_file(file)
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    notes = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    config = json.loads(notes["maejax"])
    for change, text in (
        ({"model": config["model"] | {"depth": 10**9}}, "expected (1000000000, "),
        ({"model": config["model"] | {"width": 64}}, "expected"),
        ({"secret": 1}, "the key secret"),
    ):
        save_file(arrays, file, notes | {"maejax": json.dumps(config | change)})
        refused(capsys, tmp_path / "own", text, arguments=())
    save_file(arrays, file)
    refused(capsys, tmp_path / "own", "not the config that `maejax convert` writes", arguments=())


def test_networks_that_a_format_cannot_hold(tmp_path, capsys):
    for name, change, format, text in (
        ("mask", {"model.mask_tokens": "true"}, "facebook", "decoder/mask_token is missing"),
        ("rect", {"image_size": "16,32"}, "huggingface", "square images"),
    ):
        weights = seeded_run(tmp_path / name, change)
        if name == "mask":  # an encoder with mask tokens has the token itself, and its decoder none
            import shutil

            from maejax.convert.weights import Weights, save_run

            arrays = dict(weights.arrays)
            arrays["encoder/mask_token"] = np.zeros((1, 1, 48), np.float32)
            del arrays["decoder/mask_token"]
            shutil.rmtree(tmp_path / name)
            (tmp_path / name).mkdir()
            save_run(Weights(weights.config, arrays, weights.origin), tmp_path / name)
        refused(capsys, tmp_path / name, text, arguments=(f"--to={format}",), allowed=100 * 2**20)
    seeded_run(tmp_path / "alone", decoder=False)
    refused(capsys, tmp_path / "alone", "there is no decoder", arguments=("--to=huggingface",))
