"""The launcher's port: ranks report to it, and are told of signals.

Anybody on the network may connect to it. Who does not send the job's token first is not read any further, and the
oldest such connection makes room for a new one, so strangers cost neither time nor files.
"""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bactrian.driver.launch.job_end import Failure, Loss
from bactrian.driver.launch.rank_process import RELEASE
from bactrian.passes.frame.errors import ConfigError

MOST_STRANGERS = 64  # beside the ranks that are on their way
_HOLD_SECONDS = 0.1  # in which a loss is heard of that came before a failure
_LINE_BYTES = 2 << 20  # of one record
_CHUNK_BYTES = 1 << 16
_OTHER_FILES = 64  # that this process may have open
_MOST = 1 << 62  # of a number


@dataclass
class _Rank:
    """What one rank told: which it is, how far it came, and how it ended."""

    number: int
    host: str
    pid: int
    step: int = -1  # at least so many are over
    ended: bool = False
    code: int | None = None  # given to os._exit

    @property
    def name(self) -> str:
        return f"rank {self.number} on {self.host} (process {self.pid})"

    @property
    def place(self) -> str:
        """Its name, and where it was last heard of."""
        heard = f"in step {self.step} or soon after" if self.step >= 0 else "before the first step"
        return f"{self.name}, {heard}"


@dataclass(eq=False)
class _Peer:
    """One connection: a stranger's until the token has come, a rank's once it says which."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    rank: _Rank | None = None


class ReportServer:
    """The port, and what was heard on it.

    Attributes:
        address: where ranks reach it, ``host:port``.
        ends: of the ranks that did not end well, in the order in which they were heard of.
        codes: of the ranks that ended by themselves.
    """

    def __init__(self, host: str, token: str, num_ranks: int, selector: selectors.BaseSelector) -> None:
        """Listen on one address of this host. The selector's keys get functions to call as their data.

        Raises:
            ConfigError: so many ranks can't be listened to.
        """
        _allow_files(2 * num_ranks + MOST_STRANGERS + _OTHER_FILES)
        self._token, self._num_ranks, self._selector = token.encode(), num_ranks, selector
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.ends: list[Failure | Loss] = []
        self.codes: list[int] = []
        self._strangers: list[_Peer] = []
        self._ranks: dict[int, _Peer] = {}
        self._signals: list[int] = []
        self._held: list[tuple[float, _Peer, Failure]] = []  # since when
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def num_reported(self) -> int:
        """How many ranks have reported."""
        return len(self._ranks)

    @property
    def num_strangers(self) -> int:
        """How many connections have not sent the token yet."""
        return len(self._strangers)

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks, also to those that come later."""
        self._signals.append(number)
        for peer in self._ranks.values():
            _send(peer, number)

    def release(self) -> None:
        """Let ranks abort that failed some while ago; call it now and then.

        Another rank's failure may be no more than the echo of a loss, and be heard of first. A rank that has failed
        waits for this before it aborts the job, so that what is lost meanwhile was not lost for its sake.
        """
        while self._held and time.monotonic() - self._held[0][0] > _HOLD_SECONDS:
            _send(self._held.pop(0)[1], RELEASE)

    def close(self) -> None:
        """Listen no longer."""
        self._selector.unregister(self._listener)
        self._listener.close()
        for peer in [*self._strangers, *self._ranks.values()]:
            peer.connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        peer = _Peer(connection)
        self._strangers.append(peer)
        if len(self._strangers) > MOST_STRANGERS + self._num_ranks:
            self._drop(self._strangers[0])
        hear = partial(self._hear, peer)
        self._selector.register(connection, selectors.EVENT_READ, hear)
        hear()

    def _hear(self, peer: _Peer) -> None:
        """Read all that has come."""
        while peer.connection.fileno() >= 0:  # it may have made room meanwhile
            strange = peer in self._strangers
            try:
                data = peer.connection.recv(len(self._token) - len(peer.received) if strange else _CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            peer.received += data
            if not data or not (self._admit(peer) if strange else self._read(peer)):
                self._drop(peer)
                return

    def _admit(self, peer: _Peer) -> bool:
        """Judge a stranger by what it has sent so far; false for a wrong token."""
        if len(peer.received) < len(self._token):
            return True
        if not secrets.compare_digest(bytes(peer.received), self._token):
            return False
        peer.received.clear()
        self._strangers.remove(peer)
        return True

    def _read(self, peer: _Peer) -> bool:
        """Take in all whole records; false if one is none."""
        *lines, peer.received = peer.received.split(b"\n")
        return len(peer.received) <= _LINE_BYTES and all(self._record(peer, line) for line in lines)

    def _record(self, peer: _Peer, line: bytearray) -> bool:
        try:
            record: dict[str, Any] = json.loads(line)
            kind, rank = record["kind"], peer.rank
            if rank is None:
                return kind == "started" and self._start(peer, record)
            if kind == "step":
                rank.step = _whole(record["step"])
            elif kind == "exited":
                rank.code = _whole(record["code"], 255)
            elif kind == "failed":
                failure = Failure(rank.name, _whole(record["code"], 255), str(record["text"]))
                self.ends.append(failure)
                self._held.append((time.monotonic(), peer, failure))
                rank.ended = True
            elif kind == "done":
                self.codes.append(_whole(record["code"], 255))
                rank.ended = True
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        return True

    def _start(self, peer: _Peer, record: dict[str, Any]) -> bool:
        number, pid = _whole(record["rank"], self._num_ranks - 1), _whole(record["pid"])
        rank = _Rank(number, str(record["host"]), pid)
        if rank.number in self._ranks:
            return False
        peer.rank, self._ranks[rank.number] = rank, peer
        for signal in self._signals:
            _send(peer, signal)
        return True

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer in self._strangers:
            self._strangers.remove(peer)
        if peer.rank is not None and not peer.rank.ended:
            held = [id(failure) for _, _, failure in self._held]
            place = next((i for i, end in enumerate(self.ends) if id(end) in held), len(self.ends))
            self.ends.insert(place, Loss(peer.rank.number, peer.rank.place, peer.rank.code))


def _send(peer: _Peer, number: int) -> None:
    with contextlib.suppress(OSError):  # it is gone, which is noticed elsewhere
        peer.connection.send(bytes([number]))


def _whole(value: object, most: int = _MOST) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(value)
    return value


def _allow_files(count: int) -> None:
    """Let this process have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    if hard < count:
        raise ConfigError(
            f"cannot listen to so many ranks: that takes {count} open files, and a process may have {hard}",
            fix=f"raise the limit (`ulimit -Hn {count}`), or start fewer ranks",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
