"""Files, archives, links and names made to run something, to write elsewhere, or to take all memory.

Each attack makes its files in a folder of its own and returns a command that meets them. Whatever is executed or
written outside leaves a canary.
"""
# ruff: noqa: E501 - tables

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from odd_images import npy_header
from seeded import seeded_run

from maejax import config as configs

ROOT = Path(__file__).parents[1]
Attack = Callable[[Path, Path], list[str]]  # (own folder, canary) -> the command's arguments


class Payload:
    """Touches the canary when it is unpickled by anything that runs pickles."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def convert(path: Path) -> list[str]:
    return ["convert", str(path), str(path.parent / "out"), "--heads=4", "--decoder-heads=4", "--norm-pix"]


def pretrain(source: str | Path, folder: Path) -> list[str]:
    return ["pretrain", str(source), f"--workdir={folder / 'run'}"]


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> list[str]:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return convert(path)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sparse(path: Path, start: bytes, length: int) -> Path:
    path.write_bytes(start)
    os.truncate(path, length)
    return path


def calls(name: str) -> Attack:
    """A .pth whose pickle calls a function by its name."""
    module, attribute = name.split()

    def attack(folder: Path, canary: Path) -> list[str]:
        argument = f"__import__('os').system('touch {canary}')".encode()
        program = f"c{module}\n{attribute}\n(".encode() + b"X" + struct.pack("<I", len(argument)) + argument + b"tR."
        return zipped(folder / "x.pth", {"archive/data.pkl": program})

    return attack


def pickled(name: str, protocol: int) -> Attack:
    def attack(folder: Path, canary: Path) -> list[str]:
        program = pickle.dumps({"model": {"a": Payload(canary)}}, protocol)
        if name.endswith(".pth"):
            return zipped(folder / name, {"archive/data.pkl": program, "archive/data/0": bytes(8)})
        return convert(written(folder / name, program))

    return attack


def tarred(change: Callable[[tarfile.TarInfo, Path], None], content: bytes = b"hello") -> Attack:
    """As the oldest .pth files were."""

    def attack(folder: Path, canary: Path) -> list[str]:
        with tarfile.open(folder / "x.pth.tar", "w") as archive:
            info = tarfile.TarInfo("pickle")
            info.size = len(content)
            change(info, canary)
            archive.addfile(info, io.BytesIO(content if info.isreg() else b""))
        return convert(folder / "x.pth.tar")

    return attack


def named(name: str) -> Callable[[tarfile.TarInfo, Path], None]:
    return lambda info, canary: setattr(info, "name", str(canary) if name == "absolute" else f"{name}{canary.name}")


def kind(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo, Path], None]:
    def change(info: tarfile.TarInfo, canary: Path) -> None:
        info.type, info.linkname, info.size = kind, target or str(canary), 0

    return change


def linked(target: str) -> Attack:
    def attack(folder: Path, canary: Path) -> list[str]:
        (folder / "x.safetensors").symlink_to(target)
        return convert(folder / "x.safetensors")

    return attack


def pipe(folder: Path, canary: Path) -> list[str]:
    os.mkfifo(folder / "x.pth")
    return convert(folder / "x.pth")


def safetensors(header: dict[str, Any] | bytes, data: bytes = bytes(24)) -> Attack:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda folder, canary: convert(written(folder / "x.safetensors", struct.pack("<Q", len(raw)) + raw + data))


def objective_elsewhere(folder: Path, canary: Path) -> list[str]:
    """The header's config names a module that lies beside the file: to import it would be to run it."""
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef Thing(**_): return None\n")
    c = configs.to_dict(configs.default()) | {"objective": "evil:Thing", "total_steps": 1}
    c["data"] |= {"source": "evil:Thing"}
    header = {
        "__metadata__": {"maejax": json.dumps(c)},
        "encoder/embed/kernel": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    return safetensors(header)(folder, canary)


def folder_with(name: str, content: bytes, length: int = 0) -> Attack:
    """Weights of Hugging Face with another file beside them."""

    def attack(folder: Path, canary: Path) -> list[str]:
        (folder / "hub").mkdir()
        raw = json.dumps({"vit.layernorm.weight": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode()
        (folder / "hub" / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24))
        sparse(folder / "hub" / name, content, length or len(content))
        return convert(folder / "hub")

    return attack


def run_with(change: Callable[[Path], object], verb: str = "convert") -> Attack:
    """A whole run, in which something was replaced; `change` is given its folder."""

    def attack(folder: Path, canary: Path) -> list[str]:
        seeded_run(folder / "run")
        change(folder / "run")
        return {
            "convert": ["convert", str(folder / "run"), str(folder / "out"), "--to=safetensors"],
            "report": ["report", str(folder / "run")], "evaluate": ["evaluate", str(folder / "run"), "--with=rankme"],
            "from": ["pretrain", "digits", f"--workdir={folder / 'next'}", f"--from={folder / 'run'}"],
        }[verb]  # fmt: skip

    return attack


def manifest(run: Path) -> Path:
    return next(run.glob("checkpoints/*/manifest.json"))


def leaf(run: Path) -> Path:
    """The largest file of its checkpoint."""
    return max(
        (file for file in run.glob("checkpoints/*/**/*") if file.is_file()), key=lambda file: file.stat().st_size
    )


def replaced(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/etc")


def sourced(text: str) -> Attack:
    return lambda folder, canary: pretrain(text.replace("CANARY", str(canary)), folder)


def other_bytes(path: Path) -> None:
    """A link to a file elsewhere, of the same length."""
    outside = path.parents[4] / "outside"
    outside.write_bytes(bytes(path.stat().st_size))
    replaced(path, str(outside))


def images(name: str, content: bytes) -> Attack:
    def attack(folder: Path, canary: Path) -> list[str]:
        (folder / "photos").mkdir()
        (folder / "photos" / name).write_bytes(content.replace(b"CANARY", str(canary).encode()))
        return pretrain(folder / "photos", folder)

    return attack


def npy_of_objects(folder: Path, canary: Path) -> list[str]:
    (folder / "photos").mkdir()
    np.save(folder / "photos" / "x.npy", np.array([[Payload(canary)]], dtype=object))
    return pretrain(folder / "photos", folder)


def records_of_pickles(folder: Path, canary: Path) -> list[str]:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
    writer.write(pickle.dumps(Payload(canary)))
    writer.close()
    return pretrain(f"arrayrecord:{folder}/*.array_record", folder)


def npz_of_objects(folder: Path, canary: Path) -> list[str]:
    np.savez(folder / "x.npz", a=np.array([Payload(canary)], dtype=object))
    return convert(folder / "x.npz")


NPY = npy_header("(2, 3)", "<f4") + bytes(24)
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch CANARY) (w) file closefile\n%%EOF\n"
)
GIGABYTE = 2**30
ATTACKS: dict[str, Attack] = {
    **{f"pickle {protocol} {name}": pickled(name, protocol) for name in ("x.pth", "x.pt", "x.safetensors", "x.npz") for protocol in (2, 5)},
    **{f"calls {name}": calls(name) for name in (
        "builtins eval", "builtins exec", "builtins __import__", "os system", "posix system", "subprocess Popen", "runpy run_path",
        "functools partial", "operator methodcaller", "torch.hub load", "torch load", "numpy load", "maejax.errors import_object",
    )},
    "npz of objects": npz_of_objects, "npy of objects": npy_of_objects, "records of pickles": records_of_pickles,
    "npz that climbs": lambda folder, canary: zipped(folder / "x.npz", {f"../{canary.name}.npy": NPY, f"../{canary.name}": NPY}),
    "npz with a pickle": lambda folder, canary: zipped(folder / "x.npz", {"a.npy": NPY, "b.pkl": pickle.dumps(Payload(canary))}),
    "pth that climbs": lambda folder, canary: zipped(folder / "x.pth", {f"../{canary.name}/data.pkl": b"\x80\x02}.", f"../{canary.name}": b"x"}),
    "pth with an absolute name": lambda folder, canary: zipped(folder / "x.pth", {f"{canary}/data.pkl": b"\x80\x02}.", str(canary): b"x"}),
    "zip bomb pth": lambda folder, canary: zipped(folder / "x.pth", {"archive/data.pkl": bytes(300_000_000)}, zipfile.ZIP_DEFLATED),
    "zip bomb npz": lambda folder, canary: zipped(folder / "x.npz", {"a.npy": NPY[:128] + bytes(300_000_000)}, zipfile.ZIP_DEFLATED),
    "tar that climbs": tarred(named("../")), "tar with an absolute name": tarred(named("absolute")),
    "tar with a link": tarred(kind(tarfile.SYMTYPE)), "tar with a hard link": tarred(kind(tarfile.LNKTYPE, "/etc/passwd")),
    "tar with a device": tarred(kind(tarfile.CHRTYPE)), "tar with a pipe": tarred(kind(tarfile.FIFOTYPE)),
    "pipe": pipe, "link to zeros": linked("/dev/zero"), "link to itself": linked("x.safetensors"), "link to nowhere": linked("nothing"),
    "link to a folder": linked("/etc"), "link to text": linked("/etc/passwd"), "link to its memory": linked("/proc/self/mem"),
    "header of exabytes": lambda folder, canary: convert(written(folder / "x.safetensors", struct.pack("<Q", 2**62) + b"{}")),
    "header of a gigabyte": lambda folder, canary: convert(sparse(folder / "x.safetensors", struct.pack("<Q", GIGABYTE) + b"{", GIGABYTE + 99)),
    "header nested": safetensors(b'{"a":' + b"[" * 1_000_000), "header of lies": safetensors({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 24]}}),
    "tensors that overlap": safetensors({name: {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]} for name in "ab"}),
    "config nested in a header": safetensors({"__metadata__": {"maejax": "[" * 100_000}, "encoder/embed/kernel": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}),
    "objective elsewhere": objective_elsewhere,
    "config.json of a gigabyte": folder_with("config.json", b'{"a": "', GIGABYTE), "config.json nested": folder_with("config.json", b"[" * 1_000_000),
    "README of a gigabyte": folder_with("README.md", b"license: x\n", GIGABYTE),
    **{f"run: {name}": run_with(change) for name, change in {
        "manifest of a gigabyte": lambda run: sparse(manifest(run), b'{"files": "', GIGABYTE), "manifest of zeros": lambda run: replaced(manifest(run), "/dev/zero"),
        "leaf to zeros": lambda run: replaced(leaf(run), "/dev/zero"), "leaf elsewhere": lambda run: other_bytes(leaf(run)),
        "leaf to a folder": lambda run: replaced(leaf(run), "/etc"), "leaf that is a pipe": lambda run: to_pipe(leaf(run)),
        "another file": lambda run: (leaf(run).parent / "more").write_text("x"), "checkpoint elsewhere": lambda run: to_folder(manifest(run).parent),
    }.items()},
    "run: config.json of a gigabyte": run_with(lambda run: sparse(run / "config.json", b'{"a": "', GIGABYTE), "report"),
    "run: config.json nested": run_with(lambda run: (run / "config.json").write_text("[" * 100_000), "evaluate"),
    "run: config.json of another kind": run_with(lambda run: (run / "config.json").write_text("[1]"), "from"),
    "postscript": images("x.jpg", POSTSCRIPT), "vector": images("x.png", b"<svg><image href='file://CANARY'/></svg>"),
    "npy header that calls": images("x.npy", b"\x93NUMPY\x01\0v\0" + b"__import__('os').system('touch CANARY')".ljust(117) + b"\n"),
    **{f"source {text}": sourced(text) for text in (
        "pipe:touch CANARY", "|touch CANARY", "arrayrecord:|touch CANARY", "folder:$(touch CANARY)", "`touch CANARY`", "tfds:../../CANARY",
        "https://example.invalid/CANARY", "os:system", "builtins:eval", "subprocess:Popen",
    )},
}  # fmt: skip

RUN_ALL = """
import contextlib, io, json, os, resource, sys, time
from maejax.cli import main
import maejax.convert.read, maejax.convert.write, maejax.prepare  # what is loaded now is not the attack's
for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    err, start, before = io.StringIO(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except BaseException as error:
            code = f"{type(error).__name__} {error}"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"code": code, "error": err.getvalue(), "seconds": time.perf_counter() - start,
                      "mb": (rss - before) / 1024}), flush=True)
"""


def attack_all(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Makes the attacks, meets them in one process, and holds what is promised of each."""
    canary, commands = folder / "canary", []
    for number, name in enumerate(names):
        own = folder / f"{number:03}"
        own.mkdir()
        commands.append((str(own), ATTACKS[name](own, canary)))
    assert not canary.exists(), "made by the attacker himself"
    before = snapshot(folder)
    env = os.environ | {"PYTHONPATH": f":{ROOT}", "JAX_PLATFORMS": "cpu"}  # the current folder first, as in `python -m`
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(commands), capture_output=True, text=True, env=env, cwd=folder,
        timeout=300,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(names), (names[len(results)], done.stderr)
    assert not canary.exists(), "something was executed"
    assert snapshot(folder) == before, set(snapshot(folder)) ^ set(before)
    for name, result in zip(names, results, strict=True):
        assert result["code"] in (2, 66), (name, result)
        assert result["error"].startswith("maejax: ") and result["error"].count("\n") == 1, (name, result)
        assert result["mb"] <= 200, (name, result)
    return results


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts)
