"""Campaigns against `maejax data pack`."""

import json
import os
import signal
import subprocess
import sys

from soak import Trial, campaign

RECORDS = 1797  # digits: two shards


@campaign(
    row=41,
    fault="SIGKILL of maejax data pack at a random record or shard, up to three times",
    promise="the same command again ends with the bytes of a pack that nothing happened to",
    trials=20,
    fast="test_data_pack.py",
)
def pack_killed(trial: Trial) -> dict[str, float]:
    """Kills it on its way, then lets it end."""
    whole, broken = trial.folder / "whole", trial.folder / "broken"
    kills = trial.rng.randint(1, 3)
    for _ in range(kills):
        point, last = trial.rng.choice([("pack_record", RECORDS), ("pack_shard", 2)])
        fault = f"{point}:*:{trial.rng.randint(1, last)}:kill"
        assert pack(broken, MAEJAX_FAULT=fault) in (-signal.SIGKILL, 0)  # 0: so much was not left to do
    assert pack(broken) == 0 and pack(whole) == 0
    left, right = ({path.name: path.read_bytes() for path in folder.glob("[!.]*")} for folder in (whole, broken))
    assert left == right
    assert json.loads((broken / "pack.json").read_text())["images"] == RECORDS
    return {"kills": kills}


def pack(folder, **environment: str) -> int:
    """Packs the digits in a process of its own; its exit code."""
    command = [sys.executable, "-m", "maejax", "data", "pack", "digits", str(folder), "--split=all", "--workers=1"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    return run.returncode
