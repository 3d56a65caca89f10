"""Merges `pip freeze` outputs of several Pythons into one constraints file with environment markers.

    python .ci/freeze.py 3.11=freeze311.txt 3.12=freeze312.txt 3.13=freeze313.txt > constraints.txt

Called by `make constraints`. Names and versions only: no address of any index ends up in the file.
"""

import re
import sys

HEADER = """\
# Every package that maejax[test] installs, by the versions it is tested with, for each Python.
# Made by `make constraints`; used by the Makefile as `pip install -c constraints.txt`.
"""


def main(arguments: list[str]) -> None:
    """Prints the merged file."""
    pins: dict[str, dict[str, str]] = {}
    pythons = [argument.partition("=")[0] for argument in arguments]
    for argument in arguments:
        python, _, path = argument.partition("=")
        for line in open(path):
            if match := re.fullmatch(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line.strip()):
                name = re.sub(r"[-_.]+", "-", match[1]).lower()
                if name not in ("maejax", "pip"):
                    pins.setdefault(name, {})[python] = match[2]
    print(HEADER, end="")
    for name, versions in sorted(pins.items()):
        for version in sorted(set(versions.values())):
            having = [python for python in pythons if versions.get(python) == version]
            if len(having) == len(pythons):
                print(f"{name}=={version}")
            else:
                marker = " or ".join(f'python_version == "{python}"' for python in having)
                print(f"{name}=={version} ; {marker}")


if __name__ == "__main__":
    main(sys.argv[1:])
