"""The style of the code as tests: imports point one way, files stay short, every key is used, nothing leaks."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from maejax import config as configs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "maejax"

# From the top down: a module imports only what stands below it, or to the left of it in its own row.
LAYERS = [
    "__main__",
    "cli",
    "commands/__init__ commands/arguments commands/pretrain commands/finetune commands/evaluate commands/reconstruct "
    "commands/launch commands/convert commands/report commands/sweep commands/watch commands/plan "
    "commands/data commands/bench commands/bench_data commands/bench_step",
    "reports/__init__ reports/page reports/charts reports/pictures reports/run reports/sweep watch",
    "local",
    "ranking",
    "sweep",
    "train encoder forecast",
    "surroundings",
    "prepare",
    "program",
    "convert/write convert/read convert/verify",
    "convert/infer",
    "convert/source convert/onnx start",
    "convert/weights convert/cards convert/forward",
    "evaluate runs",
    "describe",
    "build",
    "evals/features evals/accuracy evals/knn evals/probe evals/rankme evals/__init__ hooks",
    "replicas skips",
    "interruption rollback",
    "visualize suggest stored checkpoint step record ledger",
    "workdir state shapes",
    "objectives/mae objectives/pca objectives/classify objectives/__init__",
    "models/cpu models/attention_tpu models/blocks_tpu models/layers models/vit models/decoder models/cross "
    "models/__init__ mesh sharding optimizer",
    "data/__init__ data/content data/decode data/files data/desk data/workers data/resize data/partial data/packed "
    "data/randaugment data/transforms data/sources data/scan data/masking data/batches data/cache data/pipeline "
    "data/pack check overrides metrics launcher",
    "convert/timm convert/facebook convert/huggingface convert/big_vision convert/files",
    "convert/unpickle convert/torchfile convert/names convert/adapt convert/__init__",
    "targets",
    "__init__ errors redact bounded config tree fingerprint guard allocator chips hlo faults parent supervise watchdog "
    "signals rollcall peers lookout coordination distributed fake processes agreement manifest",
]
RANK = {name: (-row, column) for row, line in enumerate(LAYERS) for column, name in enumerate(line.split())}
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
LONGER = {"config.default": 110, "train.train": 70}  # one key a line; one run, read from top to bottom

MODULES = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree: ast.Module) -> set[str]:
    """The package's own modules that a module imports, lazily or not; typing-only imports do not count."""
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        assert not getattr(node, "level", 0), "write absolute imports: this test reads only those"
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("maejax") for alias in node.names), "write `from maejax import NAME`"
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("maejax"):
            base = "/".join((node.module or "").split(".")[1:])
            for alias in node.names:
                name = f"{base}/{alias.name}" if base else alias.name
                module = next((m for m in (name, base, f"{base}/__init__") if m in MODULES), "__init__")
                found.add(module)
    return found


def test_every_module_has_its_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    if name == "__init__":  # lazy, for `maejax.load_encoder`
        return
    for other in imported(TREES[name]):
        assert RANK[other][0] < RANK[name][0] or (RANK[other][0] == RANK[name][0] and RANK[other][1] < RANK[name][1]), (
            f"{name} imports {other}"
        )


def test_parts_do_not_know_the_config():
    for name, tree in TREES.items():
        if name.startswith(("models/", "data/", "objectives/", "evals/")) or name in ("step", "state", "optimizer"):
            assert not {"config", "build"} & imported(tree), name
        if name.startswith(("models/", "data/", "objectives/")):
            assert "mesh" not in imported(tree), name


def test_data_does_not_import_jax():
    for name, tree in TREES.items():
        if name.startswith("data/"):
            assert not re.search(r"\bimport jax|from jax", ast.unparse(tree)), name


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short_and_documented(name):
    tree, text = TREES[name], MODULES[name].read_text()
    assert ast.get_docstring(tree), f"{name} has no docstring"
    assert text.count("\n") <= LONGEST_FILE, f"{name} has more than {LONGEST_FILE} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            limit = LONGER.get(f"{name}.{node.name}", LONGEST_FUNCTION)
            assert length <= limit, f"{name}.{node.name} has {length} lines"
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and node in tree.body:
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_no_module_is_named_for_nothing():
    assert not [name for name in MODULES if re.search(r"util|misc|helper|common|_lib", name)]


def test_every_key_is_read():
    text = "\n".join(path.read_text() for name, path in MODULES.items() if name != "config")
    durations = {f"{name}_{unit}" for name in configs.DURATIONS for unit in ("steps", "epochs", "examples")}
    for key, _ in configs.flatten(configs.default()):
        if key not in durations:
            leaf = key.rpartition(".")[2]
            assert re.search(rf"\.{leaf}\b", text) or f"c.{key.partition('.')[0]})" in text, f"nothing reads {key}"
    assert "config.get(" not in text + MODULES["config"].read_text()


def test_every_key_has_a_comment_or_a_commented_neighbor():
    lines = (PACKAGE / "config.py").read_text().split("def default()")[1].split("return c.lock()")[0].splitlines()
    bare = [line.strip() for line in lines if re.match(r"\s+c\.[a-z_.]+ = ", line) and "#" not in line]
    groups = [line for line in bare if "ConfigDict()" in line]
    assert len(bare) - len(groups) <= 12, bare


def tracked() -> list[Path]:
    """The tree's own files: what git knows, or in a copy without git everything but hidden and built folders."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    found = [path for path in ROOT.rglob("*") if path.is_file()]
    built = re.compile(r"\.venv|\.\w+_cache$|__pycache__$|(build|dist|runs)$|.*\.egg-info$")
    return [path for path in found if not any(built.match(part) for part in path.relative_to(ROOT).parts[:-1])]


def test_nothing_of_this_machine_and_no_index_is_in_the_tree():
    # The folder that holds this checkout, unless it is one that any text may name.
    parent = (
        "" if str(ROOT.parent) in ("/", "/tmp", "/home", "/root") else rf"|(?<![\w.]){re.escape(str(ROOT.parent))}/"
    )
    forbidden = re.compile(
        rf"py[p]i\.org|files\.python[h]osted|--index[-]url|(?<![\w.]){re.escape(str(ROOT))}\b{parent}"
    )
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:  # text
            leak = forbidden.search(content.decode(errors="ignore"))
            assert not leak, f"{path.relative_to(ROOT)} contains {leak[0]}"
