"""Ranks that make different calls are told apart, whoever is ahead of whom, and those that do not are left alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import pytest

from bactrian.passes.frame.errors import BactrianError, ConfigError, RuntimeFault
from bactrian.runtime import lockstep
from bactrian.runtime.control import SingleProcess
from bactrian.runtime.lockstep import ENDED, CallLog, CollectiveCall, Report, Watch

STEP = CollectiveCall("step", "train", "x float32[32,8]", 1)
COMPILE = CollectiveCall("compile", "train", "x float32[32,8]", 1)
OTHER_SHAPE = CollectiveCall("compile", "train", "x float32[64,8]", 2)
GATHER = CollectiveCall("call", "bactrian.gather of params[0] and 3 more")


class Mailbox(SingleProcess):
    """A rank of a job in this process, as far as a watch asks for it."""

    def __init__(self, rank: int, size: int, sent: deque[Any]) -> None:
        self.rank, self.size, self.sent = rank, size, sent

    def send(self, value: Any, rank: int) -> None:
        assert rank == 0
        self.sent.append(value)

    def poll(self) -> Any:
        return self.sent.popleft() if self.sent else None


class Job:
    """Ranks that note calls, and their watches, which look when they are told to."""

    def __init__(self, num_ranks: int) -> None:
        self.sent = deque[Any]()
        self.logs = [CallLog() for _ in range(num_ranks)]
        self.watches = [
            Watch(Mailbox(rank, num_ranks, self.sent), log, lambda rank=rank: f"train.py:{rank + 10} (main)")
            for rank, log in enumerate(self.logs)
        ]

    def all_call(self, *calls: CollectiveCall) -> None:
        for log in self.logs:
            for call in calls:
                log.note(call)

    def look(self) -> None:
        """Often enough for what stands still to be told and heard."""
        for _ in range(2):
            for watch in reversed(self.watches):
                watch.look()

    def error(self) -> BactrianError:
        with pytest.raises(BactrianError) as caught:
            self.look()
        return caught.value


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_ends_before_the_others_is_named(leaving: int) -> None:
    job = Job(2)
    job.all_call(COMPILE, STEP, STEP, STEP)
    job.logs[leaving].note(ENDED)
    job.logs[1 - leaving].note(STEP)
    error = job.error()
    assert isinstance(error, RuntimeFault)
    assert error.message == f"rank {leaving} has ended its program, but rank {1 - leaving} is in step 3 of train"
    assert f"rank {1 - leaving} on " in error.where and f"train.py:{11 - leaving} (main)" in error.where
    assert "4 before were alike" in error.why and "as many steps" in error.fix


def test_a_call_on_one_rank_only_is_named() -> None:
    job = Job(4)
    job.all_call(COMPILE, STEP)
    job.logs[0].note(GATHER)
    for log in job.logs[1:]:
        log.note(STEP)
    error = job.error()
    assert error.message == f"rank 0 calls {GATHER.name}, but ranks 1, 2 and 3 are in step 1 of train"
    assert "is_main_rank" in error.fix


@pytest.mark.parametrize("ahead", [1, 40])
def test_it_is_found_though_the_rank_went_on(ahead: int) -> None:
    """Who sends need not wait: rank 0 is far ahead in calls that rank 1 has not made at all."""
    job = Job(2)
    job.all_call(COMPILE, STEP)
    for number in range(ahead):
        job.logs[0].note(GATHER)
        job.logs[0].note(CollectiveCall("call", f"bactrian.gather of params[{number}]"))
    job.logs[0].note(ENDED)
    job.logs[1].note(STEP)
    assert job.error().message == f"rank 0 calls {GATHER.name}, but rank 1 is in step 1 of train"


def test_another_shape_is_an_error_about_arguments() -> None:
    job = Job(3)
    job.all_call(COMPILE, STEP)
    for log, call in zip(job.logs, (STEP, OTHER_SHAPE, STEP), strict=True):
        log.note(call)
    error = job.error()
    assert isinstance(error, ConfigError)
    assert error.message == (
        "ranks differ in the arguments of train: ranks 0 and 2 have x float32[32,8], rank 1 has x float32[64,8]"
    )


def test_compiling_again_with_the_same_arguments_is_named() -> None:
    job = Job(2)
    job.all_call(COMPILE, STEP)
    job.logs[0].note(STEP)
    job.logs[1].note(COMPILE)
    assert job.error().message == "rank 1 compiles train, but rank 0 is in step 1 of train"


def test_ranks_of_which_one_is_ahead_are_left_alone() -> None:
    job = Job(2)
    job.all_call(COMPILE, STEP)
    for _ in range(5):
        job.logs[0].note(STEP)
    job.logs[0].note(GATHER)
    job.look()
    job.logs[1].note(STEP)
    job.look()
    for call in (STEP, STEP, STEP, STEP, GATHER):
        job.logs[1].note(call)
    job.look()


def test_who_is_ahead_further_than_is_remembered_is_left_alone() -> None:
    job = Job(2)
    job.all_call(COMPILE)
    for _ in range(300):
        job.logs[0].note(STEP)
        job.logs[0].note(GATHER)
    job.look()
    assert job.logs[0].report(0, "").num_calls == job.logs[0].count == 601


def test_nothing_is_sent_while_calls_are_short() -> None:
    job = Job(2)
    for _ in range(100):
        job.all_call(STEP)
        job.watches[1].look()
    assert not job.sent
    job.watches[1].look()  # it stands
    job.watches[1].look()
    assert len(job.sent) == 1


def test_rank_0_leaves_last_and_at_once_when_all_have_ended() -> None:
    job = Job(3)
    job.all_call(COMPILE, STEP)
    leaving = threading.Thread(target=job.watches[0].leave)
    leaving.start()
    job.watches[2].leave()
    leaving.join(0.2)
    assert leaving.is_alive()
    job.watches[1].leave()
    leaving.join(10)
    assert not leaving.is_alive()


def test_rank_0_that_has_ended_finds_who_makes_one_more_step() -> None:
    job = Job(2)
    job.all_call(COMPILE, STEP)
    job.logs[1].note(STEP)
    for _ in range(2):
        job.watches[1].look()
    with pytest.raises(RuntimeFault, match="rank 0 has ended its program, but rank 1 is in step 1 of train"):
        job.watches[0].leave()


def test_who_is_late_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lockstep, "_LATE_SECONDS", 0.0)
    job = Job(3)
    job.all_call(COMPILE, STEP)
    for _ in range(2):
        job.watches[1].look()
    job.logs[0].note(STEP)
    for _ in range(4):
        job.watches[0].look()
    (record,) = caplog.records
    assert "ranks 1 and 2 have not come so far; last seen: rank 1 on " in record.getMessage()
    assert "train.py:11 (main); rank 2: nothing was heard of it" in record.getMessage()


def test_an_error_of_the_watch_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: ended.append(args.exc_value))
    monkeypatch.setattr(lockstep, "_LOOK_SECONDS", 0.001)
    job = Job(2)
    job.logs[0].note(STEP)
    job.logs[1].note(GATHER)
    for _ in range(2):
        job.watches[1].look()
    job.watches[0].start()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [type(error) for error in ended] == [RuntimeFault]


class Told(SingleProcess):
    """Rank 0 of two ranks, of which the other one has told something."""

    size = 2

    def __init__(self, report: Report) -> None:
        self.report = report

    def allgather(self, value: Any) -> list[Any]:
        return [value, (self.report, "theirs")]


def test_what_ranks_exchange_is_not_taken_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    log, other = CallLog(), CallLog()
    monkeypatch.setattr(lockstep, "_calls_made", log)
    for each in (log, other):
        each.note(COMPILE)
    assert lockstep.exchange(Told(other.report(1, "")), "mine") == ["mine", "theirs"]
    log.note(GATHER)
    other.note(STEP)
    with pytest.raises(RuntimeFault, match=r"rank 0 calls bactrian\.gather of .*, but rank 1 is in step 0 of train"):
        lockstep.exchange(Told(other.report(1, "")), "mine")


def test_other_threads_calls_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    log = CallLog()
    monkeypatch.setattr(lockstep, "_calls_made", log)
    thread = threading.Thread(target=lockstep.note, args=(GATHER,))
    thread.start()
    thread.join()
    assert log.count == 0
    lockstep.note(GATHER)
    assert log.count == 1
