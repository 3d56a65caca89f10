"""The line between the processes of a run, for as long as it lasts: who lives, where each is, why one ended.

Every process keeps the connection to process 0 that it had at the roll call, and tells over it once a second where it
is. A process that dies closes its connection, whatever hardware the others wait on; a machine that vanishes answers no
longer (TCP notices after a minute; MAEJAX_HEARTBEAT_SECONDS). Process 0 knows all of them, decides the first cause, and
tells everybody. What to do then is the lookout's affair.
"""

import dataclasses
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Mapping
from typing import Any

from maejax import watchdog
from maejax.errors import PeerLost, Stalled, UsageError
from maejax.rollcall import Connections

BEAT = 1.0  # seconds
SILENCE = 5.0  # seconds without a word after which a process is said to be silent; no reason to end anything
FOLLOW = 20.0  # seconds that the others have to end by themselves after one ended with an error that all should share
HEARTBEAT_SECONDS = 60.0
LONGEST = 100_000  # bytes that may wait to be read of a message
STRAGGLING, SLOW_STEPS, SHARE = 1.5, 20, 0.1  # times the others' median, for so many steps; of a step's time


@dataclasses.dataclass
class Peer:
    """What is known of a process."""

    host: str
    connection: socket.socket | None = None  # None: this process itself
    heard: float = dataclasses.field(default_factory=time.monotonic)
    phase: str = "start"
    step: int = 0
    marks: int = 0
    since: float = math.inf  # when it came to there, and when that has taken too long, on this process's clock
    deadline: float = math.inf
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    left: tuple[int, str] | None = None  # exit code and reason of one that has finished
    received: bytes = b""
    unsent: bytes = b""

    def where(self) -> str:
        """In a few words, for people."""
        return watchdog.place(self.step, self.phase)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why everybody ends, and with what code; `at`: when, on this process's clock."""

    code: int
    text: str
    at: float


class Line:
    """One process's end of the line; the lookout's thread alone reads and writes it."""

    def __init__(self, process: int, connections: Connections):
        self.process = process
        self.verdict: Verdict | None = None
        self.all_left = False
        self.warnings: list[str] = []  # of stragglers
        self._beaten = 0.0
        self._measured: dict[int, dict[str, float]] = {}  # of each process, where the window of steps began
        self._since, self._window = 0.0, 2  # the first step compiles; windows of steps begin after it
        patience = heartbeat_seconds()
        self.peers = {process: Peer(socket.gethostname())}
        for number, (connection, host) in sorted(connections.items()):
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))
            self.peers[number] = Peer(host, connection)

    # ---- Telling ----------------------------------------------------------------------------------------------------

    def beat(self, *, now: float) -> None:
        """Tells where this process is, once a second."""
        p, me = watchdog.progress, self.peers[self.process]
        me.phase, me.step, me.marks, me.deadline, me.heard = p.phase, p.step, p.marks, p.deadline, now
        me.since, me.spent = p.since, dict(p.spent)
        if now - self._beaten >= BEAT:
            self._beaten = now
            left = None if math.isinf(p.deadline) else p.deadline - now
            self._send({"beat": [p.phase, p.step, p.marks, now - p.since, left, me.spent]})
            if self.process == 0:
                self._look_for_stragglers()

    def leave(self, code: int, text: str) -> None:
        """Says that this process has come to its end, so that its silence from now on means nothing."""
        self.peers[self.process].left = code, text
        self._send({"left": [code, text]})
        self._settle()

    def end(self, code: int, text: str) -> None:
        """Says why everybody has to end, now."""
        if self.process == 0:
            self._decide(code, text)
        else:
            self._send({"end": [code, text]})

    def _send(self, message: dict[str, Any]) -> None:
        """To process 0, or from it to all; to one that has stopped reading, only what is more than a heartbeat."""
        raw = json.dumps(message).encode() + b"\n"
        for peer in self.peers.values():
            if peer.connection:
                peer.unsent += b"" if peer.unsent and "beat" in message else raw
                try:
                    peer.unsent = peer.unsent[peer.connection.send(peer.unsent) :]
                except OSError:  # full, or `read` will say what is wrong with it
                    continue

    # ---- Hearing ----------------------------------------------------------------------------------------------------

    def sockets(self) -> list[socket.socket]:
        """The connections that are open."""
        return [peer.connection for peer in self.peers.values() if peer.connection]

    def read(self, connection: socket.socket) -> None:
        """Takes in what has come over a connection."""
        number, peer = next((n, p) for n, p in self.peers.items() if p.connection is connection)
        try:
            data = connection.recv(65536)
            why = "" if data else "died (no word"
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, why = b"", "died (no word"
        except OSError as error:  # ETIMEDOUT, EHOSTUNREACH, ...
            data, why = b"", f"cannot be reached ({os.strerror(error.errno or 0).lower()}"
        *lines, peer.received = (peer.received + data).split(b"\n")
        try:
            for line in lines:
                self._take(number, peer, json.loads(line))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # nobody of ours
            why = why or "sends nonsense (it is none of ours"
        if why or len(peer.received) > LONGEST:
            connection.close()
            peer.connection = None
            if peer.left is not None:
                self.all_left |= self.process != 0
            elif not self.all_left:
                who, silent = f"process {number} on {peer.host}", time.monotonic() - peer.heard
                if silent > SILENCE:  # something held it, until its watchdog or somebody else ended it
                    said = f"stalled: {who} said nothing for {silent:.0f} s (last in {peer.where()}), and has ended"
                    self._decide(Stalled.exit_code, said)
                else:
                    said = f"{who} {why or 'sends nonsense (no end'}; last in {peer.where()})"
                    self._decide(PeerLost.exit_code, said)
                peer.left = (PeerLost.exit_code, "died")

    def _take(self, number: int, peer: Peer, message: dict[str, Any]) -> None:
        now = time.monotonic()
        peer.heard = now
        for kind, value in message.items():
            if kind == "beat":
                peer.phase, peer.step, peer.marks, age, left, peer.spent = value
                peer.since = now - age
                peer.deadline = math.inf if left is None else now + left
            elif kind == "left":
                peer.left = value[0], value[1]
                self._settle()
            elif kind == "end":  # process 0 hears why a process ended, and the others what it decided
                self._decide(*value)
            elif kind == "all left":
                self.all_left = True

    # ---- Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, code: int, text: str, wait: float = 0.0) -> None:
        """The first cause counts. Process 0 tells it to everybody."""
        if self.verdict is None or (not wait and self.verdict.at > time.monotonic()):
            self.verdict = Verdict(code, text, time.monotonic() + wait)
            if self.process == 0 and not wait:
                self._send({"end": [code, text]})

    def _settle(self) -> None:
        """Process 0, when one has left: have all? Has it left behind others who should have failed as it did?"""
        if self.process != 0:
            return
        if all(peer.left for peer in self.peers.values()):
            self.verdict, self.all_left = None, True
            self._send({"all left": True})
            return
        for number, peer in self.peers.items():
            if peer.left and peer.left[0]:
                self._decide(PeerLost.exit_code, f"process {number} on {peer.host} ended: {peer.left[1]}", FOLLOW)
                return

    def judge(self, now: float) -> Verdict | None:
        """What everybody has to end of: on process 0 always, on others when process 0 is silent and they are late."""
        if self.verdict and now >= self.verdict.at:
            if self.process == 0:
                self._send({"end": [self.verdict.code, self.verdict.text]})
            return self.verdict
        if self.process and now - self.peers[0].heard < SILENCE:
            return None
        if text := who_is_late(self.peers, now):
            self._decide(Stalled.exit_code, text)
            return self.verdict
        return None

    def _look_for_stragglers(self) -> None:
        steps = min(peer.step for peer in self.peers.values())
        if steps < self._window or any(peer.left for peer in self.peers.values()):
            return
        now = {number: dict(peer.spent) for number, peer in self.peers.items()}
        if self._measured:
            time_per_step = (time.monotonic() - self._since) / SLOW_STEPS
            per_step = {
                number: {
                    phase: (now[number].get(phase, 0) - self._measured[number].get(phase, 0)) / SLOW_STEPS
                    for phase in ("data", "step", "save")
                }
                for number in now
            }
            if text := slowest(per_step, time_per_step, {number: peer.host for number, peer in self.peers.items()}):
                self.warnings.append(text)
        self._measured, self._window, self._since = now, steps + SLOW_STEPS, time.monotonic()


def who_is_late(peers: Mapping[int, Peer], now: float) -> str:
    """Which process holds all others up, for longer than its phase may take; "" if none does.

    It is the one that is furthest behind; of several that are equally far, the one that is silent. Where a silent one
    is nobody knows: it is late, too, when another process has waited too long and it was silent all that time.
    """
    running = {number: peer for number, peer in peers.items() if not peer.left}
    if not running:
        return ""
    last = min((peer.step, peer.marks) for peer in running.values())
    impatient = [p.since + SILENCE for p in running.values() if now > p.deadline and now - p.heard <= SILENCE]
    silent = {
        n: p
        for n, p in running.items()
        if now - p.heard > SILENCE and (now > p.deadline or p.heard < max(impatient, default=-math.inf))
    }
    behind = silent or {n: p for n, p in running.items() if (p.step, p.marks) == last}
    if not silent and not all(now > peer.deadline for peer in behind.values()):
        return ""
    if len(behind) == len(peers) > 1:
        some = next(iter(behind.values()))
        return f"stalled: all processes wait in {some.where()}, and none is behind the others"
    named = ", ".join(
        f"process {n} on {p.host} in {p.where()}" + (f" (silent for {now - p.heard:.0f} s)" if n in silent else "")
        for n, p in behind.items()
    )
    return f"stalled: {named} took too long" + ("" if len(peers) == 1 else "; the others wait for it")


def slowest(per_step: Mapping[int, Mapping[str, float]], time_per_step: float, hosts: Mapping[int, str]) -> str:
    """One line on the process that keeps the others waiting, if there is one; "" if none does to speak of.

    `per_step` are seconds by process and phase, without waits for others; a step takes `time_per_step` in all.
    """
    own = {number: sum(phases.values()) for number, phases in per_step.items()}
    worst = max(own, key=lambda number: own[number])
    others = statistics.median(seconds for number, seconds in own.items() if number != worst)
    if own[worst] <= STRAGGLING * others or own[worst] - others < SHARE * time_per_step:
        return ""
    listed = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in per_step[worst].items())
    return (
        f"warning: process {worst} on {hosts[worst]} is slow: {own[worst]:.3g} s of its own a step ({listed}), "
        f"{own[worst] / max(others, 1e-9):.1f} times the others' median, over {SLOW_STEPS} steps"
    )


def heartbeat_seconds() -> float:
    """How long a machine may answer nothing: MAEJAX_HEARTBEAT_SECONDS."""
    text = os.environ.get("MAEJAX_HEARTBEAT_SECONDS", str(HEARTBEAT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds < 1e6:
        raise UsageError(f"MAEJAX_HEARTBEAT_SECONDS={text} must be a number of seconds, 1 or more")
    return seconds
