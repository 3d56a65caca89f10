"""What processes agree on beside the loop, in threads of their own: whether a thing that all of them do has worked.

It goes through the coordination service of JAX's runtime and not through devices, which belong to the training step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from maejax.errors import reason_of

SECONDS = 600.0  # that a process waits for the others, at most


class FailedElsewhere(Exception):
    """Another process has failed; the message says which and why."""


class Agreement:
    """One thing that all processes do in stages. A stage ends for all alike: when each has done it, or one has failed.

    With one process there is nothing to agree on.
    """

    def __init__(self, name: str):
        self._name, self._stage = f"maejax/{name}", 0

    def reach(self, problem: str = "", *, seconds: float = SECONDS) -> None:
        """Waits until all have ended the stage; `problem` says that this process could not.

        Raises:
          FailedElsewhere: another process could not.
        """
        if jax.process_count() == 1:
            return
        stage, self._stage, client = f"{self._name}/{self._stage}", self._stage + 1, _client()
        mine, wait = jax.process_index(), int(seconds * 1000)
        client.key_value_set(f"{stage}/{mine}", problem or "done")
        if mine == 0:
            said = [client.blocking_key_value_get(f"{stage}/{process}", wait) for process in range(jax.process_count())]
            failed = [f"process {process}: {text}" for process, text in enumerate(said) if text != "done"]
            client.key_value_set(f"{stage}/all", failed[0] if failed else "done")
        outcome = client.blocking_key_value_get(f"{stage}/all", wait)
        if outcome != "done" and not problem:
            raise FailedElsewhere(outcome)

    @contextmanager
    def stage(self) -> Iterator[None]:
        """The `with` block is a stage: an error in it ends it for all."""
        try:
            yield
        except FailedElsewhere:
            raise
        except Exception as error:
            self.reach(reason_of(error))
            raise
        self.reach()

    def forget(self) -> None:
        """Frees what the service remembers of it; for process 0, when all processes have ended it."""
        if jax.process_count() > 1:
            _client().key_value_delete(f"{self._name}/")


def _client() -> Any:
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
