"""What looks like a secret never gets into a file or a log: commands and configs with one are refused, text is masked.

A secret is the user-info of a URL (but `git@`), the value of a name that ends in token, secret, password, api_key and
the like, what begins as the tokens of well-known services do, and the value of an environment variable of such a name.
"""

import functools
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

# Of the expressions here, each begins with fixed letters: lines may be long, and their time must not be a square.
MASK = "***"
SHORTEST = 8  # characters of an environment variable's value that is looked for elsewhere
# This project's own keys cls_token and mask_tokens are none.
NAME = (
    r"(?:secret|password|passwd|passphrase|(?:api|access|private|account|secret)[_-]?key|credentials?|signature"
    r"|(?<!cls_)(?<!mask_)token)"
)
USER_INFO = re.compile(r"(://)(?!git@)[^\s/'\"]+@")
ASSIGNED = re.compile(rf"({NAME}(?:['\"]?\s*[=:]\s*['\"]?|%3D))([^\s'\"&,;]+)", re.IGNORECASE)
FLAG = re.compile(rf"--?[\w.-]*{NAME}", re.IGNORECASE)
SHARED_ACCESS = re.compile(r"([?&](?:sig|auth|key)=)[^\s'\"&]+", re.IGNORECASE)
KNOWN = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|sk-|AKIA|ASIA|AIza|ya29\.|npm_|eyJ[\w-]{8,}\.)[\w.-]{12,}"
)


def masked(text: str) -> str:
    """The text with *** for each secret in it."""
    text = USER_INFO.sub(rf"\1{MASK}@", text)
    text = ASSIGNED.sub(rf"\1{MASK}", text)
    text = SHARED_ACCESS.sub(rf"\1{MASK}", text)
    text = KNOWN.sub(MASK, text)
    for value in _of_environment():
        text = text.replace(value, MASK)
    return text


@functools.cache
def _of_environment() -> tuple[str, ...]:
    name = re.compile(rf".*{NAME}", re.IGNORECASE)
    found = {value for key, value in os.environ.items() if name.fullmatch(key) and len(value) >= SHORTEST}
    return tuple(sorted(found, key=len, reverse=True))


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """A command's arguments, masked; `--token VALUE` in two, too."""
    found, hide = [], False
    for argument in arguments:
        found.append(MASK if hide else masked(argument))
        hide = FLAG.fullmatch(argument) is not None
    return found


def mask_tracebacks() -> None:
    """From now on, what Python prints of an error that nobody caught is masked."""

    def print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = print_masked
