"""What no file of this project may do: run what it reads. Found in the syntax tree, so that no spelling hides it."""
# ruff: noqa: E501 - tables

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("maejax", "configs", "benchmarks", "launch", ".ci") for path in (ROOT / folder).rglob("*.py")
]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen", "pty.spawn",
    "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path",
    "code.interact", "pandas.read_pickle", "numpy.fromregex",
}  # fmt: skip
# The places that run a file: a recipe is a Python program, and named by the user.
ALLOWED = {("maejax/config.py", "exec_module"), ("benchmarks/ablations.py", "exec_module")}


def violations(tree: ast.AST, file: str) -> list[str]:
    """Each with its line."""
    names: dict[str, str] = {}  # what an imported name stands for
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names if alias.asname}
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules = [node.module or ""]
        else:
            modules = []
        found += [f"{node.lineno} imports {m}" for m in modules if m.partition(".")[0] in MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        written = ast.unparse(node.func)
        first, _, rest = written.partition(".")
        called = names.get(first, first) + (f".{rest}" if rest else "")
        called = called.replace("np.", "numpy.", 1) if called.startswith("np.") else called
        last = called.rpartition(".")[2]
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CALLS or (last == "exec_module" and (file, last) not in ALLOWED):
            found.append(f"{node.lineno} calls {called}")
        if (
            called == "getattr"
            and len(node.args) > 1
            and ast.unparse(node.args[1]).strip("'\"") in ("eval", "exec", "system")
        ):
            found.append(f"{node.lineno} gets {ast.unparse(node.args[1])}")
        if called in ("yaml.load", "yaml.load_all") and "Safe" not in arguments.get("Loader", "") + ast.unparse(node):
            found.append(f"{node.lineno} loads YAML that may call")
        of_archive = last == "extractall" or (last == "extract" and re.search("tar|zip|archive", called))
        if of_archive and arguments.get("filter", "").strip("'\"") != "data":
            found.append(f"{node.lineno} extracts without filter='data'")
        if last == "unpack_archive" and arguments.get("filter", "").strip("'\"") != "data":
            found.append(f"{node.lineno} unpacks without filter='data'")
        if called == "torch.load" and arguments.get("weights_only") != "True":
            found.append(f"{node.lineno} torch.load of anything but weights")
        for keyword in ("allow_pickle", "shell"):
            if arguments.get(keyword, "False") != "False":
                found.append(f"{node.lineno} {keyword}={arguments[keyword]}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    assert not violations(ast.parse(path.read_text()), str(path.relative_to(ROOT)))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "from _pickle import Unpickler", "import dill",
        "def f():\n    import marshal", "eval('1')", "exec('1')", "from builtins import eval as e; e('1')", "import os; os.system('x')",
        "from os import system; system('x')", "import os as o; o.popen('x')", "import yaml; yaml.load(x)",
        "import yaml; yaml.load(x, Loader=yaml.Loader)", "import yaml; yaml.unsafe_load(x)", "import numpy as np; np.load(x, allow_pickle=True)",
        "import numpy; numpy.load(x, allow_pickle=y)", "import subprocess; subprocess.run('x', shell=True)",
        "from subprocess import Popen; Popen('x', shell=flag)", "tar.extractall('x')", "tar.extractall('x', filter='fully_trusted')",
        "archive.extract(name, out)", "import shutil; shutil.unpack_archive(x, y)", "spec.loader.exec_module(m)",
        "import torch; torch.load(x)", "import torch; torch.load(x, weights_only=False)", "getattr(b, 'eval')('1')", "compile('1', 'x', 'eval')",
        "__import__('os')", "import runpy; runpy.run_path('x')",
    ],
)  # fmt: skip
def test_the_gate_sees(text):
    assert violations(ast.parse(text), "x.py")


def test_the_gate_lets_pass():
    for text in (
        "import pickletools", "import numpy as np; np.load(x, allow_pickle=False)", "tar.extractall('x', filter='data')",
        "import re; re.compile('x')", "import yaml; yaml.safe_load(x)", "import torch; torch.load(x, weights_only=True)",
        "import subprocess; subprocess.run(['x'])", "jax.jit(f).lower(x).compile()", "evaluate(x)",
    ):  # fmt: skip
        assert not violations(ast.parse(text), "x.py")
