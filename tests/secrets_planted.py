"""Twenty secrets in all the places where people put them, and a run that is full of chances to tell them."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIABLES = (
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET", "GITHUB_TOKEN", "DB_PASSWORD", "MY_CREDENTIALS", "service_passphrase",
)  # fmt: skip
# A source that speaks of its secrets wherever it can: in names, in errors, in a warning on stderr.
SOURCE = """
import os, numpy as np
from maejax.data.decode import BadImage
class Images:
    num_classes = None
    def __init__(self, split): self.split = split
    def __len__(self): return 40
    def __getitem__(self, i):
        if i % 4 == 0: raise OSError(os.environ["HF_TOKEN"] + " " + self.name(i))
        return {"image": np.full((16, 16, 3), i, np.uint8)}
    def name(self, i): return f"https://me:SECRET@host/{i}.png?sig=SECRET&x=1 token=SECRET " + os.environ["DB_PASSWORD"]
    def fingerprint(self): return "0123456789abcdef"
"""
RECIPE = """
from maejax import config
def get_config():
    c = config.default()
    c.data.source, c.batch_size, c.total_steps, c.save_steps, c.image_size = "leaky:Images", 8, 4, 2, (16,)
    c.model.patch, c.model.width, c.model.depth, c.model.heads, c.log_steps = (4,), 16, 1, 2, 1
    c.decoder.width, c.decoder.depth, c.decoder.heads, c.data.max_bad_fraction = 16, 1, 2, 1.0
    return c
"""


def secret(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijkmnopqrstuvwxyzACDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(24))


def run_with_secrets(folder: Path, rng: random.Random, processes: int) -> tuple[list[str], set[str]]:
    """A whole run with a report; returns the secrets that were found in its bytes and the addresses it listened at."""
    known = {name: secret(rng) for name in VARIABLES}
    planted = secret(rng)
    (folder / "leaky.py").write_text(SOURCE.replace("SECRET", planted))
    (folder / "recipe.py").write_text(RECIPE)
    out = folder / "out"
    out.mkdir()
    env = os.environ | known | {"PYTHONPATH": f"{ROOT}:{folder}"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, "-m", "maejax", "pretrain", "--config=recipe.py", "--workdir=out/run"]
    several = [f"--fake-processes={processes}"] if processes > 1 else []
    with (out / "said.txt").open("wb") as said:
        run = subprocess.Popen([*command, *several], cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT)
        listened: set[str] = set()
        while run.poll() is None:
            listened |= listening(run.pid)
            time.sleep(0.5)
    assert run.returncode == 0, (out / "said.txt").read_text()
    for arguments in (["report", "out/run"], [*refused(planted)]):
        done = subprocess.run([*command[:3], *arguments], cwd=folder, env=env, capture_output=True)
        (out / f"{arguments[0]}-{len(arguments)}.txt").write_bytes(done.stdout + done.stderr)
        assert done.returncode == (0 if arguments[0] == "report" else 2), done.stderr
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 20
    content = b"\n".join(path.read_bytes() for path in written)
    return [name for name, value in (known | {"planted": planted}).items() if value.encode() in content], listened


def refused(planted: str) -> list[str]:
    """A command that holds one."""
    return ["pretrain", "--config=recipe.py", "--workdir=out/run", f"--config.data.dir=https://me:{planted}@host/data"]


# ---- Sockets --------------------------------------------------------------------------------------------------------


def listening(root: int) -> set[str]:
    """Local addresses, in hexadecimal as in /proc/net/tcp, at which a process or one of its children listens."""
    inodes = set()
    for pid in family(root):
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file))
            except OSError:
                continue
            inodes |= {found[1]} if found else set()
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def family(root: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found
