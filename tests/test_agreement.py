"""What processes agree on beside the loop, with threads in their places and a dictionary for the service."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from maejax import agreement
from maejax.agreement import Agreement, FailedElsewhere


class Service:
    """The part of JAX's coordination client that is used."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self._values, "said twice"
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise TimeoutError(key)
            return self._values[key]

    def key_value_delete(self, prefix):
        with self._changed:
            self._values = {key: value for key, value in self._values.items() if not key.startswith(prefix)}


@pytest.fixture
def service(monkeypatch):
    made, here = Service(), threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: here.number)
    monkeypatch.setattr(agreement, "_client", lambda: made)

    def run(work):
        """`work(number)` in three processes; what each returned or raised."""

        def one(number):
            here.number = number
            try:
                return work(number)
            except Exception as error:
                return error

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, range(3)))

    made.run = run
    return made


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_what_fails_on_one_fails_on_all_at_the_same_stage(service, who, when):
    reached = [0, 0, 0]

    def work(number):
        shared = Agreement("save/7")
        for stage in range(3):
            with shared.stage():
                if (number, stage) == (who, when):
                    raise OSError(28, "No space left on device")
            reached[number] = stage + 1

    outcome = service.run(work)
    assert reached == [when] * 3
    assert isinstance(outcome.pop(who), OSError)
    for error in outcome:
        assert isinstance(error, FailedElsewhere) and str(error) == f"process {who}: No space left on device"


def test_two_failures_at_once_are_told_by_their_own_processes(service):
    def work(number):
        with Agreement("x").stage():
            if number:
                raise ValueError(f"mine {number}")

    outcome = [str(error) for error in service.run(work)]
    assert outcome == ["process 1: mine 1", "mine 1", "mine 2"]


def test_nobody_waits_for_ever(service):
    def work(number):
        if number != 2:
            Agreement("x").reach(seconds=0.1)

    outcome = service.run(work)
    assert [type(error) for error in outcome] == [TimeoutError, TimeoutError, type(None)]


def test_what_has_ended_is_forgotten(service):
    def work(number):
        shared = Agreement("x")
        shared.reach()
        shared.reach()

    service.run(work)
    assert len(service._values) == 8

    def forget(number):
        return Agreement("x").forget() if number == 0 else None

    service.run(forget)
    assert not service._values


def test_one_process_agrees_with_itself():
    with Agreement("x").stage():
        pass
    with pytest.raises(OSError, match="mine"), Agreement("x").stage():
        raise OSError("mine")
