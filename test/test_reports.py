"""The launcher's port: who may speak there, what is taken in, and that nothing that is sent there disturbs it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bactrian.driver.launch import rank_process, reports
from bactrian.driver.launch.job_end import Failure, Loss
from bactrian.driver.launch.reports import ReportServer
from bactrian.passes.frame.errors import ConfigError

TOKEN = "0123456789abcdef" * 2


class Port:
    """A server, and the loop that a job has."""

    def __init__(self, num_ranks: int = 3) -> None:
        self.selector = selectors.DefaultSelector()
        self.server = ReportServer("127.0.0.1", TOKEN, num_ranks, self.selector)
        self.connections: list[socket.socket] = []

    @property
    def num_connected(self) -> int:
        return len(self.selector.get_map()) - 1

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline
            for key, _ in self.selector.select(0.01):
                key.data()
            self.server.release()

    def connect(self, data: bytes = b"") -> socket.socket:
        host, port = self.server.address.split(":")
        connection = socket.create_connection((host, int(port)))
        self.connections.append(connection)
        connection.sendall(data)
        return connection

    def rank(self, number: int, *records: dict[str, Any]) -> socket.socket:
        """A connection of a rank that has reported."""
        reported = self.server.num_reported
        started = {"kind": "started", "rank": number, "host": "a", "pid": 7 + number}
        connection = self.connect(TOKEN.encode() + b"".join(map(line, (started, *records))))
        self.until(lambda: self.server.num_reported > reported)
        return connection


def line(record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.server.close()
    for connection in made.connections:
        connection.close()
    made.selector.close()


def test_ranks_report(port: Port) -> None:
    first = port.rank(1, {"kind": "step", "step": 4})
    port.rank(0, {"kind": "done", "code": 75}).close()
    port.rank(2, {"kind": "failed", "code": 3, "text": "error: no\n"}).close()
    first.close()
    port.until(lambda: port.num_connected == 0)
    assert port.server.codes == [75]
    assert port.server.ends == [
        Loss(1, "rank 1 on a (process 8), in step 4 or soon after"),
        Failure("rank 2 on a (process 9)", 3, "error: no\n"),
    ]


def test_an_exit_that_was_told_is_known(port: Port) -> None:
    port.rank(0, {"kind": "exited", "code": 9}).close()
    port.until(lambda: bool(port.server.ends))
    assert port.server.ends == [Loss(0, "rank 0 on a (process 7), before the first step", 9)]


def test_a_loss_comes_before_its_echoes(port: Port) -> None:
    lost, survivor = port.rank(0), port.rank(1)
    survivor.sendall(line({"kind": "failed", "code": 1, "text": "MPI_ERR_PROC_FAILED\n"}))
    port.until(lambda: len(port.server.ends) == 1)
    lost.close()
    port.until(lambda: len(port.server.ends) == 2)
    assert isinstance(port.server.ends[0], Loss)


def test_what_is_lost_once_a_rank_may_abort_comes_after_its_failure(port: Port) -> None:
    ended, failing, late = port.rank(0), port.rank(1), port.rank(2)
    failing.sendall(line({"kind": "failed", "code": 1, "text": "boom\n"}))
    port.until(lambda: failing in select.select([failing], [], [], 0)[0])
    assert failing.recv(9) == bytes([rank_process.RELEASE])
    ended.close()
    port.until(lambda: len(port.server.ends) == 2)
    late.sendall(line({"kind": "failed", "code": 1, "text": "an echo\n"}))
    port.until(lambda: len(port.server.ends) == 3)
    assert [type(end) for end in port.server.ends] == [Failure, Loss, Failure]


@pytest.mark.parametrize(
    "sent",
    [
        b"[" * 100_000 + b"\n",
        b'{"kind": "started", "rank": 0, "host": "a", "pid": 1}\n',
        b"\n" * 40,
        b"\0\xff" * 40,
        TOKEN[:-1].encode() + b"0",
    ],
)
def test_who_has_no_token_is_not_read(port: Port, sent: bytes) -> None:
    stranger = port.connect(sent)
    port.until(lambda: is_closed(stranger))
    assert (port.server.num_reported, port.server.ends) == (0, [])
    port.rank(0)


@pytest.mark.parametrize(
    "sent",
    [
        b"[" * 200_000 + b"]" * 200_000 + b"\n",
        b'"' + b"x" * (3 << 20),
        b"\xff\n",
        line({"kind": "started", "rank": 3, "host": "a", "pid": 1}),
        line({"kind": "started", "rank": -1, "host": "a", "pid": 1}),
        line({"kind": "started", "rank": float("inf"), "host": "a", "pid": 1}),
        line({"kind": "step", "step": 1}),
        line([1]),
        line({}),
    ],
)
def test_wrong_records_end_their_connection_alone(port: Port, sent: bytes) -> None:
    other = port.rank(1)
    wrong = port.connect(TOKEN.encode())
    with contextlib.suppress(OSError):  # closed meanwhile
        for start in range(0, len(sent), 1 << 16):
            wrong.sendall(sent[start : start + (1 << 16)])
            port.until(lambda: not port.selector.select(0))
    port.until(lambda: is_closed(wrong))
    assert (port.server.num_reported, port.server.ends) == (1, [])
    other.sendall(line({"kind": "done", "code": 0}))
    port.until(lambda: port.server.codes == [0])


def test_a_rank_number_is_given_once(port: Port) -> None:
    port.rank(1)
    second = port.connect(TOKEN.encode() + line({"kind": "started", "rank": 1, "host": "b", "pid": 1}))
    port.until(lambda: is_closed(second))
    assert port.server.ends == []


def test_many_strangers_do_not_keep_a_rank_out(port: Port) -> None:
    first = port.connect(b"x")
    for _ in range(200):
        port.connect()
    port.until(lambda: is_closed(first))  # the oldest makes room
    assert port.server.num_strangers == reports.MOST_STRANGERS + 3
    port.rank(2, {"kind": "done", "code": 0})
    port.until(lambda: port.server.codes == [0])


def test_signals_reach_all_ranks_also_late_ones(port: Port) -> None:
    early = port.rank(0)
    port.server.pass_on(15)
    late = port.rank(1)
    assert early.recv(9) == late.recv(9) == b"\x0f"


def test_more_ranks_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports.resource, "getrlimit", lambda _: (256, 1024))
    limits: list[object] = []
    monkeypatch.setattr(reports.resource, "setrlimit", lambda _, limit: limits.append(limit))
    with selectors.DefaultSelector() as selector:
        ReportServer("127.0.0.1", TOKEN, 200, selector).close()
        assert limits == [(528, 1024)]
        with pytest.raises(ConfigError, match="takes 1328 open files, and a process may have 1024"):
            ReportServer("127.0.0.1", TOKEN, 600, selector)


def test_a_rank_that_reaches_nobody_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv(rank_process.REPORT_VARIABLE, f"{address}:{TOKEN}")
    reporter = rank_process.Reporter()
    assert not reporter.connected and not reporter.send(kind="done", code=0)
    text = capsys.readouterr().err
    assert f"(process {os.getpid()}) {rank_process.UNHEARD.decode()}{address} (" in text
