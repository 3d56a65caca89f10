"""Bad images, bad commands, hostile files and secrets: rows 30 to 34 and 38 to 40.

The tests of `make test` hold most of these whole; here they run in the numbers of the matrix and from other seeds.
"""

import multiprocessing
import os
import signal
import time
from itertools import islice

import bombs
import hostile
import mutations
import numpy as np
import secrets_planted
import test_bad_records
import test_data_workers as traps
from bad_records import hold
from odd_images import corpus

from maejax.data.decode import BadImage, decode
from maejax.data.desk import Unusable
from soak import Trial, campaign

DEADLINE = 1.5  # seconds that a record may take here


@campaign(
    row=30, fault="more than 100 odd and malformed images, and each cut at a random place or with flipped bytes",
    promise="exactly these pixels or this cause; whatever is cut or flipped gives pixels or a cause, and nothing else",
    trials=20, fast="test_odd_images.py, test_data_decode.py",
)  # fmt: skip
def odd_images(trial: Trial) -> dict[str, float]:
    files = corpus()
    for name, (data, outcome) in files.items():
        try:
            got: object = decode(data, channels=3, max_pixels=10_000_000)
        except BadImage as error:
            got = error.cause
        same = np.array_equal(got, outcome) if isinstance(outcome, np.ndarray) else got == outcome
        assert same, (name, got)
    broken = 0
    for name, (data, _) in files.items():
        for _ in range(10 if len(data) < 100_000 else 1):
            changed = bytearray(data[: trial.rng.randrange(len(data) + 1)] if trial.rng.random() < 0.5 else data)
            for _ in range(trial.rng.randrange(1, 4) if changed else 0):
                changed[trial.rng.randrange(len(changed))] = trial.rng.randrange(256)
            try:
                pixels = decode(bytes(changed), channels=3, max_pixels=1_000_000)
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, name
            except BadImage:
                broken += 1
    return {"files": len(files), "changed files refused": broken}


@campaign(
    row=31, fault="1 % of the records bad at random",
    promise="all other rows bit for bit; the replacement depends on seed and place alone, over 1, 2, 4 processes, "
    "batch sizes, workers and restarts; every one counted by its cause",
    trials=20, fast="test_bad_records.py, test_data_pipeline.py",
)  # fmt: skip
def one_in_a_hundred(trial: Trial) -> dict[str, float]:
    return hold(trial.folder / "images", trial.rng, images=800, bad=8, epochs=3, workers=2)


@campaign(
    row=32, fault="bad records at half and at twice the limit, from the start and after many good ones",
    promise="never stopped below the limit, always within a window above it, with exit code 65",
    trials=20, fast="test_bad_records.py, test_cli.py",
)  # fmt: skip
def limit_of_bad_records(trial: Trial) -> dict[str, float]:
    limit, window = trial.rng.choice([(0.001, 100_000), (0.01, 10_000), (0.05, 10_000)])
    path, steps = trial.folder / "bad.jsonl", window // 200
    stopped = test_bad_records.steps_until_stopped
    assert stopped(path, limit / 2, limit, steps=5 * steps, seed=trial.number) is None
    early = stopped(path, 2 * limit, limit, steps=steps, seed=trial.number)
    late = stopped(path, 2 * limit, limit, steps=4 * steps, good_before=3 * steps, seed=trial.number)
    assert early is not None and late is not None
    return {"windows until stopped": early / steps, "after good ones": (late - 3 * steps) / steps}


@campaign(
    row=33, fault="decompression bombs, nested ones, 500 MB of comments, gigabytes in a header",
    promise="refused by the header: at most 200 MB of memory and one second each",
    trials=10, fast="test_odd_images.py",
)  # fmt: skip
def decompression_bombs(trial: Trial) -> dict[str, float]:
    name = sorted(bombs.BOMBS)[trial.number % len(bombs.BOMBS)]
    (result,) = bombs.measure(trial.folder, [name])
    return {"CPU seconds": result["seconds"], "MB": result["mb"]}


@campaign(
    row=34, fault="SIGKILL of a worker at a random time",
    promise="said and replaced within 5 s, the order kept",
    trials=20, fast="test_data_workers.py",
)  # fmt: skip
def killed_worker(trial: Trial) -> dict[str, float]:
    said: list[float] = []
    stream = traps.stream(traps.Trapped(), workers=2, say=lambda _: said.append(time.monotonic()))
    got = list(islice(stream, 2 + trial.rng.randrange(20)))
    victims = [child for child in multiprocessing.active_children() if "grain" in child.name]
    time.sleep(trial.rng.random() / 5)
    os.kill(trial.rng.choice(victims).pid or 0, signal.SIGKILL)
    start = time.monotonic()
    while not said:
        got.append(next(stream))
    got += islice(stream, 4)
    whole = time.monotonic() - start
    stream.close()
    traps.same(got, islice(traps.stream(traps.Trapped()), len(got)))
    assert said[0] - start <= 5
    return {"seconds until noticed": said[0] - start, "until four more batches": whole}


@campaign(
    row=34, fault="a decoder that hangs, with and without Python's lock, or crashes its process",
    promise="cut at the deadline + 2 s, the record bad, the worker replaced, the order kept; a restart knows it",
    trials=20, fast="test_data_workers.py",
)  # fmt: skip
def hanging_record(trial: Trial) -> dict[str, float]:
    kind = ("sleep", "hold", "segv", "kill")[trial.number % 4]
    record, file = trial.rng.randrange(64), trial.folder / "unusable.jsonl"
    said: list[float] = []
    began: list[float] = []
    clean = list(islice(traps.stream(traps.Trapped()), 18))
    source = traps.Trapped({record: kind}, note=str(trial.folder / "began"))
    stream = traps.stream(
        source, workers=1 + trial.number % 2, record_seconds=DEADLINE, unusable=Unusable(file),
        say=lambda _: said.append(time.time()),
    )  # fmt: skip
    got = list(islice(stream, 18))
    stream.close()
    cause = "timeout" if kind in ("sleep", "hold") else "crashed"
    assert traps.replaced(got, clean, record, cause) >= 1
    traps.same(got, islice(traps.stream(source, unusable=Unusable(file)), 18))
    began += [float(line) for line in (trial.folder / "began").read_text().split()]
    took = said[0] - began[0]
    assert took <= (DEADLINE + 2 if cause == "timeout" else 5)
    return {f"seconds until cut ({cause})": took}


@campaign(
    row=38, fault="wrong commands: the table of more than 200, and from other seeds 100 of fuzz and 200 typos",
    promise="exit code 2 and one line in at most 5 s, no device touched; the right suggestion for 95 % of typos",
    trials=10, fast="test_mutations.py, test_config.py, test_cli.py",
)  # fmt: skip
def wrong_commands(trial: Trial) -> dict[str, float]:
    slips = mutations.typos(trial.rng, 200)
    commands = [
        *(arguments for arguments, _ in mutations.TABLE), *mutations.fuzz(trial.rng, 100),
        *(mutations.flags(f"{slip}=1") for slip, _ in slips),
    ]  # fmt: skip
    results = mutations.run_all(commands, trial.folder / "places")
    wrong = [(c, r) for c, r in zip(commands, results, strict=True) if mutations.problem(r)]
    assert not wrong, wrong[:3]
    right = sum(
        mutations.suggestion(r["error"]) == key for (_, key), r in zip(slips, results[-len(slips) :], strict=True)
    )
    assert right >= 0.95 * len(slips)
    seconds = max(r["seconds"] for r in results)
    return {"commands": len(commands), "right suggestions %": 100 * right / len(slips), "slowest, CPU seconds": seconds}


@campaign(
    row=39, fault="hostile pickles, archives, links, pipes, headers, configs, manifests and names",
    promise="refused in one line; nothing executed, nothing written, at most 200 MB",
    trials=10, fast="test_hostile.py, test_convert_hostile.py, test_gate.py",
)  # fmt: skip
def hostile_files(trial: Trial) -> dict[str, float]:
    names = sorted(hostile.ATTACKS)
    trial.rng.shuffle(names)
    results = hostile.attack_all(trial.folder, names)
    return {"attacks": len(results), "largest, MB": max(r["mb"] for r in results)}


@campaign(
    row=40, fault="11 secrets in environment, names, errors and an argument, in a run of two processes and its report",
    promise="in no byte of what is written or printed; no listening socket but the coordinator's own address",
    trials=5, fast="test_redact.py",
)  # fmt: skip
def planted_secrets(trial: Trial) -> dict[str, float]:
    found, listened = secrets_planted.run_with_secrets(trial.folder, trial.rng, 2)
    assert not found, found
    assert listened and listened <= {"0100007F", "0000000000000000FFFF00000100007F"}, listened
    return {"secrets found": len(found), "listening addresses": len(listened)}


@campaign(
    row=40, fault="random secrets in 20 notations, inside random text",
    promise="masked, the text around them left alone",
    trials=20, fast="test_redact.py",
)  # fmt: skip
def masked_secrets(trial: Trial) -> dict[str, float]:
    from test_redact import HARMLESS, LEAKS, S

    from maejax.redact import masked

    secret = secrets_planted.secret(trial.rng)
    for leak in LEAKS:
        around = trial.rng.choice(HARMLESS)
        text = masked(f"{around} {leak.replace(S, secret)} {around}")
        assert secret not in text and text.startswith(f"{around} ") and text.endswith(f" {around}"), text
    return {"notations": len(LEAKS)}
