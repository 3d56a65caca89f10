"""The watchdog: what a phase may take, and an end that needs neither Python's lock nor its main thread."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maejax import watchdog
from maejax.errors import UsageError
from maejax.watchdog import BUDGETS, Progress, read_budgets

HERE = Path(__file__).parents[1]


def run(code: str, **env: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A process of its own, and the seconds that it took."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(HERE)} | env, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    return done, time.monotonic() - start


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's timers")
@pytest.mark.parametrize("hang", ["time.sleep(99)", "ctypes.PyDLL(None).sleep(99)"])
def test_what_hangs_ends_with_124_and_its_stacks(hang, tmp_path):
    code = f"""
import ctypes, time
from pathlib import Path
from maejax import watchdog
def hanging():
    {hang}
watchdog.MARGIN = 0.5
watchdog.arm()
watchdog.stacks_to(Path({str(tmp_path / "stacks.txt")!r}))
watchdog.phase("step", 3)
hanging()
"""
    done, took = run(code, MAEJAX_STALL_SECONDS="step=0.5,start=20")
    assert done.returncode == 124 and 1 <= took < 8, done
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "most recent call first" in stacks and "in hanging" in stacks


def test_progress_keeps_it_quiet_and_its_file_goes(tmp_path):
    code = f"""
import time
from pathlib import Path
from maejax import watchdog
watchdog.MARGIN = 1
watchdog.arm()
watchdog.stacks_to(Path({str(tmp_path / "stacks.txt")!r}))
for step in range(16):
    watchdog.phase("data", step)
    time.sleep(0.1)
    with watchdog.waiting():
        time.sleep(0.1)
watchdog.disarm()
"""
    done, _ = run(code, MAEJAX_STALL_SECONDS="2")
    assert done.returncode == 0 and not done.stderr, done
    assert not list(tmp_path.iterdir())


def test_budgets():
    assert read_budgets("") == BUDGETS and BUDGETS["step"] == 120
    assert set(read_budgets("7").values()) == {7.0}
    assert read_budgets("step=30,compile=7.5") == BUDGETS | {"step": 30, "compile": 7.5}
    assert set(read_budgets("0").values()) == {math.inf}
    for wrong in ("x", "steps=3", "step=-1", "step"):
        with pytest.raises(UsageError, match=f"MAEJAX_STALL_SECONDS={wrong} must be a number of seconds .* restore"):
            read_budgets(wrong)


def test_a_step_may_take_five_times_the_median(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    progress = Progress()
    progress.mark("compile", 1, False, 50)
    for step, seconds in enumerate((300, 40, 40, 900, 40), start=1):  # the first compiles; one evaluates
        progress.mark("data", step, False, 50)
        progress.mark("compile" if step == 1 else "step", step, False, 120)
        clock[0] += seconds
    progress.mark("data", 6, False, 50)
    assert progress.deadline == clock[0] + 50
    progress.mark("step", 6, False, 120)
    assert progress.deadline == clock[0] + 5 * 40
    assert progress.where() == "phase step of step 6"


def test_time_by_phase_without_waits(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    progress = Progress()
    for phase, waiting, seconds in (("data", False, 3), ("step", False, 5), ("step", True, 100), ("save", False, 2)):
        progress.mark(phase, 1, waiting, 9)
        clock[0] += seconds
    progress.mark("data", 2, False, 9)
    assert {name: progress.spent[name] for name in ("data", "step", "save")} == {"data": 3, "step": 5, "save": 2}
    assert progress.marks == 5


def test_a_phase_costs_microseconds():
    done, _ = run("""
import time
from maejax import watchdog
watchdog.arm()
start = time.perf_counter()
for step in range(2000):
    watchdog.phase("step", step)
print((time.perf_counter() - start) / 2000)
watchdog.disarm()
""")
    assert float(done.stdout) < 500e-6, done  # about 20 on an idle core
