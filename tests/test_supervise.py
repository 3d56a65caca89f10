"""The supervisor, with children that stand in for runs: what starts a run again, what ends it, who dies with whom."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maejax.cli import main
from maejax.supervise import progress, reason_of, supervise

HERE = Path(__file__).parents[1]
# Ends with the codes in the file `codes`, one at each start; a negative one is a signal. After `+` it came further.
CHILD = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
left = (folder / "codes").read_text().split()
(folder / "codes").write_text(" ".join(left[1:]))
if left[0].startswith("+"):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": %d, "time": 0}\\n' % (100 - len(left)))
code = int(left[0].strip("+"))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def attempts(folder: Path, codes: str) -> tuple[int, list[str]]:
    """The supervisor's exit code, and what it said."""
    (folder / "codes").write_text(codes)
    said: list[str] = []
    return supervise([sys.executable, "-c", CHILD, str(folder)], folder, say=said.append, pause=0.01), said


def test_what_starts_it_again_and_what_does_not(tmp_path):
    code, said = attempts(tmp_path, "75 +124 +134 -9 -11 0")
    assert code == 0 and (tmp_path / "codes").read_text() == ""
    assert said == [
        "supervise: the run was pre-empted (exit code 75) at step 0; 1 of 3 attempts without progress; starting it "
        "again in 0.01 s",
        "supervise: the run stalled (exit code 124) at step 95; starting it again in 0.01 s",
        "supervise: the run lost a process (exit code 134) at step 96; starting it again in 0.01 s",
        "supervise: the run was ended by SIGKILL (exit code 137) at step 96; 1 of 3 attempts without progress; "
        "starting it again in 0.01 s",
        "supervise: the run was ended by SIGSEGV (exit code 139) at step 96; 2 of 3 attempts without progress; "
        "starting it again in 0.02 s",
    ]
    for final in (0, 1, 2, 65, 66, 70, 74, 78, 130 - 128):
        assert reason_of(final) is None
        assert attempts(tmp_path, f"{final} 0") == (final, [])


def test_a_loop_of_crashes_ends(tmp_path):
    code, said = attempts(tmp_path, "+124 -9 -9 -9 0")
    assert code == 137 and len(said) == 4
    assert said[-1].endswith("at step 95; 3 attempts in a row came no further, so this is the end")


def test_progress_is_a_sealed_checkpoint_or_a_logged_step(tmp_path):
    assert progress(tmp_path / "none") == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "x": 1}\n{"step": 8}\n{"step": 9, "cut o')
    assert progress(tmp_path) == 8
    for name, sealed in (("20", True), ("30", False), ("rejected-40", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if sealed:
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert progress(tmp_path) == 20


def background(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, text=True)


SUPERVISOR = """
import sys
from pathlib import Path
from maejax.supervise import supervise
sys.exit(supervise([sys.executable, "-c", sys.argv[1]], Path(".")))
"""


def test_a_signal_is_passed_on_once_and_ends_it():
    child = """
import signal, sys, time
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append(1))
print("ready", flush=True)
while not came: time.sleep(0.01)
time.sleep(0.5)
print(len(came), flush=True)
sys.exit(75)
"""
    parent = background(SUPERVISOR, child)
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=20)
    assert (parent.returncode, out) == (75, "1\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal")
def test_children_die_with_the_supervisor():
    child = """
import os, time
from maejax.parent import follow_parent
follow_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
    parent = background(SUPERVISOR, child)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_mistake_ends_it(tmp_path, capfd):
    assert (
        main(["pretrain", "--config=pretrain_digits", f"--workdir={tmp_path}", "--config.seeed=1", "--supervise"]) == 2
    )
    captured = capfd.readouterr()
    assert "seeed" in captured.err and "supervise" not in captured.out
