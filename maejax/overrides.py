"""`--config.a.b=value` on the command line: finds the key, parses the value by the type of its default.

ml_collections has flags for this; its errors are tracebacks and it refuses 1e3 for a whole number, so this is our own.
"""

import copy
import difflib
import json
from typing import Any

from ml_collections import ConfigDict

from maejax.config import DURATIONS, flatten
from maejax.errors import UsageError

ALIASES = {"steps": "total_steps", "epochs": "total_epochs", "examples": "total_examples"}


def override(config: ConfigDict, assignments: dict[str, str]) -> ConfigDict:
    """`config` with `{"mask.ratio": "0.6"}` applied; values are parsed by the type of the default.

    Setting one of `NAME_steps`, `NAME_epochs`, `NAME_examples` clears the other two.
    """
    config = copy.deepcopy(config).unlock()
    for key, text in assignments.items():
        key = ALIASES.get(key, key)
        parent = _owner(config, key)
        leaf = key.rpartition(".")[2]
        parent[leaf] = _parse(key, text, parent.get_type(leaf), parent[leaf])
        if (name := key.rpartition("_")[0]) in DURATIONS:
            for unit in ("steps", "epochs", "examples"):
                if f"{name}_{unit}" != key and f"{name}_{unit}" not in assignments:
                    config[f"{name}_{unit}"] = None
    return config.lock()


def _owner(config: ConfigDict, key: str) -> ConfigDict:
    """The (sub-)config that holds the last name of a dotted key."""
    if key not in (known := [name for name, _ in flatten(config)]):
        sections = {name.partition(".")[0] for name in known if "." in name}
        if key in sections:
            inside = [name for name in known if name.startswith(f"{key}.")]
            raise UsageError(f"--config.{key} is a group of keys; set one of {', '.join(inside)}")
        raise UsageError(f"unknown key --config.{key}{_nearest(key, known)}")
    for name in key.split(".")[:-1]:
        config = config[name]
    return config


def _nearest(key: str, known: list[str]) -> str:
    # A user may have forgotten the group ("ratio") or mistyped any part of the name ("mask.raito").
    key = key.lower().replace("-", "_")

    def likeness(name: str) -> tuple[float, float]:
        whole, leaf = (
            difflib.SequenceMatcher(None, a, b).ratio()
            for a, b in ((key, name), (key.rpartition(".")[2], name.rpartition(".")[2]))
        )
        return max(whole, leaf), whole

    best = max(known, key=likeness)
    return f"; did you mean --config.{best}?" if likeness(best)[0] >= 0.6 else f"; keys: {', '.join(known)}"


def _parse(key: str, text: str, kind: type, usual: Any) -> Any:
    def refuse(expected: str) -> UsageError:
        return UsageError(f"--config.{key}={text}: expected {expected}")

    if text == "()" and kind is tuple:
        return ()
    if text in ("None", "none", "") and kind is not str:
        return None
    if kind is bool:
        if text.lower() not in (allowed := {"true": True, "1": True, "false": False, "0": False}):
            raise refuse("true or false")
        return allowed[text.lower()]
    if kind is int:
        try:
            number = float(text.replace("_", ""))  # 1e3 is a fine way to write a whole number
        except ValueError:
            raise refuse("a whole number") from None
        if not number.is_integer():
            raise refuse("a whole number")
        return int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else int(number)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise refuse("a number") from None
    if kind is tuple:
        try:
            numbers = json.loads(f"[{text.strip('()[] ').rstrip(',')}]")
            assert numbers and all(type(n) in (int, float) for n in numbers)
        except (ValueError, AssertionError):
            raise refuse("a number or several with commas between, for example 224 or 224,160") from None
        if usual and all(type(n) is int for n in usual) and not all(type(n) is int for n in numbers):
            raise refuse("whole numbers")
        return tuple(numbers)
    return text
