"""The line between processes, with sockets in one process: who died of what, who is late, who is slow."""

import json
import socket
import time

import pytest

from maejax import peers, rollcall
from maejax.errors import UsageError
from maejax.peers import Line, Peer, slowest, who_is_late


class Four:
    """Process 0's end of the line and those of 1, 2 and 3."""

    def __init__(self):
        pairs = {n: tcp_pair() for n in (1, 2, 3)}
        self.lines = {0: Line(0, {n: (pair[0], f"node{n}") for n, pair in pairs.items()})}
        self.lines |= {n: Line(n, {0: (pair[1], "node0")}) for n, pair in pairs.items()}

    def pass_messages(self, *without):
        """Until nothing moves any more."""
        for _ in range(5):
            for number, line in self.lines.items():
                if number not in without:
                    for connection in line.sockets():
                        line.read(connection)
            time.sleep(0.01)

    def die(self, number):
        for connection in self.lines[number].sockets():
            connection.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return server.accept()[0], one


@pytest.fixture
def four():
    made = Four()
    yield made
    for line in made.lines.values():
        for connection in line.sockets():
            connection.close()


def verdicts(four, *without):
    now = time.monotonic()
    found = {n: line.judge(now) for n, line in four.lines.items() if n not in without}
    return {n: (verdict.code, verdict.text) if verdict else None for n, verdict in found.items()}


def test_all_know_who_died_and_where(four):
    for line in four.lines.values():
        line.beat(now=time.monotonic())
    four.pass_messages()
    assert verdicts(four) == dict.fromkeys(range(4))
    four.lines[0].peers[2].step, four.lines[0].peers[2].phase = 41, "step"
    four.die(2)
    four.pass_messages(2)
    told = (134, "process 2 on node2 died (no word; last in phase step of step 41)")
    assert verdicts(four, 2) == {0: told, 1: told, 3: told}


def test_one_that_was_silent_before_it_ended_had_stalled(four):
    for line in four.lines.values():
        line.peers[0 if line.process else 2].heard -= 17
    four.die(2)
    four.pass_messages(2)
    told = (124, "stalled: process 2 on node2 said nothing for 17 s (last in phase start), and has ended")
    assert verdicts(four, 2) == {0: told, 1: told, 3: told}


def test_all_know_when_process_0_died(four):
    four.die(0)
    four.pass_messages(0)
    told = (134, "process 0 on node0 died (no word; last in phase start)")
    assert verdicts(four, 0) == {1: told, 2: told, 3: told}


def test_the_first_reason_counts(four):
    four.lines[3].end(134, "process 3 on node3 ended: OSError disk")
    four.pass_messages()
    four.lines[1].end(134, "process 1 on node1 ended: connection closed by peer")
    four.die(3)
    four.pass_messages(3)
    told = (134, "process 3 on node3 ended: OSError disk")
    assert verdicts(four, 3) == {0: told, 1: told, 2: told}


def test_processes_that_end_together_need_no_cause(four):
    for number in (2, 0, 3, 1):
        assert not any(line.all_left for line in four.lines.values())
        four.lines[number].leave(75, "SIGTERM: saved step 7")
        four.pass_messages()
        assert verdicts(four) == dict.fromkeys(range(4))
    assert all(line.all_left for line in four.lines.values())
    four.die(0)
    four.pass_messages(0)
    assert verdicts(four, 0) == dict.fromkeys((1, 2, 3))


def test_one_that_ends_alone_is_the_cause(four, monkeypatch):
    monkeypatch.setattr(peers, "FOLLOW", 0.05)
    four.lines[2].leave(74, "two checkpoints in a row could not be written")
    four.pass_messages()
    time.sleep(0.06)
    assert verdicts(four, 1, 2, 3)[0] == (
        134,
        "process 2 on node2 ended: two checkpoints in a row could not be written",
    )
    four.pass_messages()
    assert verdicts(four, 2)[3][0] == 134


def test_nonsense_is_none_of_ours(four):
    (connection,) = four.lines[1].sockets()
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    four.pass_messages()
    assert verdicts(four, 1)[0][1].startswith("process 1 on node1 sends nonsense")


def test_one_that_does_not_read_costs_nothing(four):
    for _ in range(3_000):
        four.lines[0]._send({"beat": ["step", 1, 1, 0, None, {"x" * 3000: 1.0}]})
    assert all(len(peer.unsent) < 4000 for peer in four.lines[0].peers.values())
    four.lines[0].end(134, "the end")
    four.pass_messages()
    for _ in range(50):
        four.lines[0]._send({"beat": ["step", 1, 1, 0, None, {}]})
        four.pass_messages()
    assert verdicts(four)[3] == (134, "the end")


# ---- Who is late, who is slow ---------------------------------------------------------------------------------------


def peer(step, marks, *, late, heard=0.0, left=None, phase="step"):
    deadline = -1.0 if late else 50.0
    return Peer("h", None, heard, phase, step, marks, since=deadline - 120, deadline=deadline, left=left)


def test_the_one_that_is_furthest_behind_is_late():
    now = 0.0
    ahead = peer(41, 200, late=True)
    assert who_is_late({0: ahead, 1: peer(41, 198, late=True, phase="data"), 2: ahead}, now) == (
        "stalled: process 1 on h in phase data of step 41 took too long; the others wait for it"
    )
    # It may take longer than the others like to wait.
    assert who_is_late({0: ahead, 1: peer(41, 198, late=False), 2: ahead}, now) == ""
    assert who_is_late({0: peer(41, 199, late=False), 1: peer(41, 200, late=False)}, now) == ""
    # Of equals the silent one; one whose last word was of a later place, too.
    for marks in (200, 201):
        found = who_is_late({0: ahead, 1: peer(41, marks, late=True, heard=-9), 2: ahead}, now)
        assert found.startswith("stalled: process 1 on h in phase step of step 41 (silent for 9 s) took too long"), (
            found
        )
    # One that was stopped as it entered a phase: its last word was of the one before, which may take longer.
    assert who_is_late({0: ahead, 1: peer(40, 1, late=False, heard=-117)}, now) == (
        "stalled: process 1 on h in phase step of step 40 (silent for 117 s) took too long; the others wait for it"
    )
    assert who_is_late({0: ahead, 1: peer(40, 1, late=False, heard=-115)}, now) == ""
    assert who_is_late({0: peer(41, 200, late=False), 1: peer(40, 1, late=False, heard=-119)}, now) == ""
    assert who_is_late({0: ahead, 1: ahead}, now) == (
        "stalled: all processes wait in phase step of step 41, and none is behind the others"
    )
    assert who_is_late({0: ahead, 1: peer(40, 1, late=True, left=(0, ""))}, now).startswith("stalled: process 0")


def test_the_slowest_is_named_with_its_phase():
    hosts = {0: "a", 1: "b", 2: "c"}
    even = {"data": 0.1, "step": 0.05, "save": 0.0}
    assert slowest({0: even, 1: even, 2: even}, 0.5, hosts) == ""
    assert slowest({0: even, 1: even | {"data": 0.4}, 2: even}, 0.5, hosts) == (
        "warning: process 1 on b is slow: 0.45 s of its own a step (data 0.4 s, step 0.05 s, save 0 s), 3.0 times the "
        "others' median, over 20 steps"
    )
    # Nothing to speak of beside a step of two seconds, and none that is half as slow again.
    tiny = {"data": 0.001, "step": 0.001, "save": 0.0}
    assert slowest({0: tiny, 1: tiny | {"data": 0.1}, 2: tiny}, 2.0, hosts) == ""
    assert slowest({0: even, 1: even | {"data": 0.17}, 2: even}, 0.3, hosts) == ""


# ---- The roll call --------------------------------------------------------------------------------------------------


def test_other_code_and_versions_are_told(monkeypatch):
    here = rollcall.what_runs()
    assert here["jax"].count(".") == 2 and len(here["maejax's code"]) == 12
    code = here["maejax's code"]
    there = here | {"jax": "9.9.9", "maejax's code": "0" * 12}
    one, other = tcp_pair()
    other.sendall(json.dumps([rollcall.HELLO, 1, 2, "node1", there]).encode() + b"\n")
    came = {}
    problem = rollcall._admit(one, came, 2)
    assert problem == (
        f"processes do not run the same: jax 9.9.9 on process 1 (node1), {here['jax']} on process 0; maejax's code "
        f"000000000000 on process 1 (node1), {code} on process 0"
    )
    one.close()
    other.close()


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("MAEJAX_HEARTBEAT_SECONDS", "soon")
    with pytest.raises(UsageError, match="MAEJAX_HEARTBEAT_SECONDS=soon must be a number of seconds, 1 or more"):
        peers.heartbeat_seconds()
