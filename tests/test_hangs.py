"""Real runs that are asked to stop in the wrong moment, stall and die; campaigns of the same are in soak/hangs.py."""

import os
import signal
import threading

import pytest
from soak.hangs import Run, no_traceback

from maejax.lookout import looking_out
from maejax.signals import Interruption


def test_a_killed_process_is_named_by_the_other_and_leaves_no_run_behind(tmp_path):
    run = Run(tmp_path, 2, MAEJAX_FAULT="step:1:12:kill")
    ends = run.end()
    assert (ends[0].code, ends[1].code) == (134, -9), ends
    assert "maejax: process 1 on " in ends[0].out and " died (no word; last in phase " in ends[0].out
    assert ends[0].at - ends[1].at < 5
    no_traceback(ends)
    assert "ended     process 1 on" in (run.workdir / "train.log").read_text()


def test_a_stalled_process_is_named_by_both(tmp_path):
    run = Run(tmp_path, 2, MAEJAX_FAULT="data:1:3:sleep=1000", MAEJAX_STALL_SECONDS="data=4")
    for number, end in enumerate(run.end()):
        assert end.code == 124, end
        assert "stalled: process 1 on " in end.out and "in phase data of step 3 took too long" in end.out
        stacks = (run.workdir / f"stacks-{number}.txt").read_text()
        assert ("in fault_point" in stacks) == (number == 1)


def test_a_signal_in_compilation_ends_it_at_once(tmp_path):
    run = Run(tmp_path, 1, MAEJAX_FAULT="compile:0:1:term,compile:0:1:hold=0.1")
    (end,) = run.end()
    assert end.code == 75, end
    assert end.out.endswith(
        "maejax: SIGTERM: nothing to save yet; the same command starts again from where this one did\n"
    )
    assert not (run.workdir / "metrics.jsonl").read_text()


# ---- Signals --------------------------------------------------------------------------------------------------------


def test_what_a_signal_asks_for():
    interruption = Interruption()
    assert interruption.hear("SIGTERM").startswith("nothing to save yet")
    interruption = Interruption()
    interruption.begun = True
    assert interruption.hear("SIGTERM") is None and interruption.signal == "SIGTERM"
    assert interruption.hear("SIGTERM") is None  # the same request, by a scheduler that signals a parent, too
    interruption._heard -= 1
    assert interruption.hear("SIGINT").startswith("asked again, stopped at once")


def test_a_signal_is_noted_by_the_loop_and_heard_by_the_thread():
    with looking_out() as lookout:
        lookout.interruption.begun = True
        heard = threading.Event()
        lookout.interruption.hear = lambda name: heard.set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert lookout.interruption.asked == "SIGTERM"  # at once, in the loop's thread: the step under way is the last
        assert heard.wait(10)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def foreign(number, frame):
    """A handler of somebody's code."""


def test_handlers_of_others_are_noticed_and_replaced():
    before = signal.signal(signal.SIGTERM, foreign)
    try:
        with looking_out() as lookout:
            said = lookout.interruption.take_back()
            assert said == [
                f"warning: {__name__}.foreign had taken SIGTERM, so that this run would not have been saved; "
                "it has been taken back"
            ]
            assert lookout.interruption.take_back() == []
            signal.signal(signal.SIGINT, foreign)
            assert "foreign had taken SIGINT" in lookout.interruption.take_back()[0]
            signal.set_wakeup_fd(-1)
            assert "had taken Python's wakeup descriptor" in lookout.interruption.take_back()[0]
            assert lookout.interruption.take_back() == []
        assert signal.getsignal(signal.SIGTERM) is foreign  # theirs again
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMAX"), reason="Linux")
def test_handlers_that_c_installs_are_noticed():
    import ctypes

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    with looking_out() as lookout:
        assert lookout.interruption.take_back() == []
        libc.signal(signal.SIGTERM, ctypes.cast(libc.abs, ctypes.c_void_p))
        assert lookout.interruption.take_back()[0].startswith("warning: a library in C had taken SIGTERM")
        assert lookout.interruption.take_back() == []
