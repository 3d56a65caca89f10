"""The command line: `maejax VERB ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from maejax.allocator import keep_freed_memory
from maejax.errors import MaejaxError, UsageError
from maejax.parent import follow_parent
from maejax.redact import mask_tracebacks, masked, masked_arguments

VERBS = {  # each a module in `maejax.commands`
    "pretrain": "train a masked autoencoder on images",
    "finetune": "train a classifier: everything, the last blocks, or a linear probe",
    "evaluate": "measure what a run's network is worth",
    "reconstruct": "draw original | masked | reconstruction",
    "sweep": "a grid of configs, ranked by what their encoders are worth",
    "report": "one HTML file that tells all of a run",
    "watch": "a run in the terminal, as it goes on",
    "launch": "start a run with Slurm, on TPU VMs, with JobSet or SkyPilot, or under a restarting script",
    "plan": "what a run needs on hardware that you do not have",
    "data": "pack images into shards that are read faster",
    "bench": "what the machine gives: images a second, by stage",
    "convert": "weights in and out: official MAE, timm, Hugging Face, ...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. A user's mistake is one line on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb, *rest = arguments or [""]
    follow_parent()
    try:
        if verb in ("", "-h", "--help"):
            print("maejax: masked-autoencoder pretraining in JAX. Commands:")
            for name, about in VERBS.items():
                print(f"  {name:12} {about}")
            print("`maejax VERB --help` shows a verb's options and examples.", flush=True)
            return 0 if verb else 2
        if verb == "--version":
            from maejax import __version__

            print(f"maejax {__version__}")
            return 0
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"unknown command {verb!r}; commands: {', '.join(VERBS)}{hint}")
        mask_tracebacks()
        _refuse_secrets(arguments)
        keep_freed_memory()
        return importlib.import_module(f"maejax.commands.{verb}").run(rest) or 0
    except MaejaxError as error:
        print(f"maejax: {masked(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `maejax ... | head` has read enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:  # before training started: nothing to save
        print("maejax: interrupted", file=sys.stderr)
        return 130


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """Raises UsageError for a command that holds a secret: everybody on the machine can read it, and files keep it."""
    for argument, shown in zip(arguments, masked_arguments(arguments), strict=True):
        if argument != shown:
            raise UsageError(
                f"the argument {shown} holds what looks like a secret, and commands are read by others and kept in "
                "files; put it into the environment or a file of credentials"
            )
