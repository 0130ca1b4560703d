"""Whether all ranks make the same calls: each notes its own, and rank 0 compares them where somebody waits. No jax.

A collective call waits for ever for a rank that does not make it, be it that the rank has ended its program, or that it
calls something else. So a thread of each rank looks a few times a second. Where its rank has not gone on since the last
look, it tells rank 0 which calls the rank has made. While calls are short, nothing is sent at all.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bactrian.passes.frame.errors import BactrianError, ConfigError, RuntimeFault

if TYPE_CHECKING:
    from bactrian.runtime.control import Control  # imports numpy, which takes the cores that it finds

_log = logging.getLogger("bactrian")

_LOOK_SECONDS = 0.25
_LEAVE_SECONDS = 0.01  # between two looks of rank 0 once it has ended its program
_LATE_SECONDS = 30.0  # after which rank 0 says for whom it waits
_MOST_RUNS = 256  # of alike calls that a rank remembers; as far as one may be ahead of another
_MOST_NAMED = 4


class CollectiveCall(NamedTuple):
    """A call that all ranks make together.

    Attributes:
        kind: ``step``, ``compile`` (of a step), ``end`` (of the program), or ``call`` for any other.
        name: of the step, or of what is called.
        detail: those of a step's arguments that are shown where ranks differ.
        key: stands for all of them.
    """

    kind: str
    name: str
    detail: str = ""
    key: int = 0


ENDED = CollectiveCall("end", "the program")


@dataclass(frozen=True)
class Report:
    """What a rank tells rank 0.

    Attributes:
        rank, host: whose it is.
        line: the user's line that is under way.
        first: the number of the first call of ``runs``.
        runs: the calls that it has made, in order; alike ones are counted.
        number: how many calls of the last one's kind and name came before it.
    """

    rank: int
    host: str
    line: str
    first: int
    runs: tuple[tuple[CollectiveCall, int], ...]
    number: int

    @property
    def num_calls(self) -> int:
        """How many calls the rank has made."""
        return self.first + sum(times for _, times in self.runs)

    @property
    def last(self) -> CollectiveCall | None:
        """The call that it has made last."""
        return self.runs[-1][0] if self.runs else None

    def starts(self) -> list[tuple[int, CollectiveCall]]:
        """The number at which each run begins, and its call."""
        found, at = list[tuple[int, CollectiveCall]](), self.first
        for call, times in self.runs:
            found.append((at, call))
            at += times
        return found

    def call(self, number: int) -> CollectiveCall | None:
        """The call with a number; None if it is not made yet, or forgotten."""
        at = self.first
        if number < at:
            return None
        for call, times in self.runs:
            at += times
            if number < at:
                return call
        return None


class _Run:
    """A call that came several times in a row."""

    __slots__ = ("call", "times")

    def __init__(self, call: CollectiveCall) -> None:
        self.call, self.times = call, 1


class CallLog:
    """The collective calls that the main thread of this process has made."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0
        self._runs: deque[_Run] = deque()
        self._totals = Counter[tuple[str, str]]()  # calls by kind and name, without those of the last run
        self._lock = threading.Lock()

    def note(self, call: CollectiveCall) -> None:
        """The call begins. Runs in every step."""
        with self._lock:
            self.count += 1
            runs = self._runs
            if runs:
                last = runs[-1]
                if last.call is call or last.call == call:
                    last.times += 1
                    return
                self._totals[last.call[:2]] += last.times
            runs.append(_Run(call))
            if len(runs) > _MOST_RUNS:
                self._first += runs.popleft().times

    @property
    def has_ended(self) -> bool:
        """Whether the end of the program came last."""
        return bool(self._runs) and self._runs[-1].call == ENDED

    def report(self, rank: int, line: str) -> Report:
        """What there is to tell."""
        with self._lock:
            runs = tuple((run.call, run.times) for run in self._runs)
            number = self._totals[runs[-1][0][:2]] + runs[-1][1] - 1 if runs else 0
            return Report(rank, socket.gethostname(), line, self._first, runs, number)


class Watch:
    """Tells rank 0 where this rank is when it stands still; on rank 0, compares what ranks have told.

    Args:
        control: of all ranks, for the watch alone.
        log: the calls of this rank.
        line: gives the user's line under way.
    """

    def __init__(self, control: Control, log: CallLog, line: Callable[[], str]) -> None:
        self._control, self._log, self.line = control, log, line
        self._reports: dict[int, Report] = {}
        self._seen = self._told = self._named = -1  # numbers of calls: at the last look, told, named as late
        self._since = time.monotonic()  # when rank 0 was first seen at its present call
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="bactrian-watch", daemon=True)

    def start(self) -> None:
        """Look now and then, until the end."""
        self._thread.start()

    def look(self) -> None:
        """Tell and hear what there is.

        Raises:
            RuntimeFault: on rank 0, of ranks that make different calls.
            ConfigError: on rank 0, of ranks that make the same call with different arguments.
        """
        log, control = self._log, self._control
        stands, self._seen = log.count == self._seen, log.count
        news = False
        if (stands or log.has_ended) and self._told != log.count:
            report = log.report(control.rank, self.line())
            self._told = report.num_calls
            if control.rank:
                control.send(report, 0)
            else:
                self._reports[0], news = report, True
        if control.rank:
            return
        while (heard := control.poll()) is not None:
            self._reports[heard.rank], news = heard, True
        if news:
            refuse_different(self._reports)
        self._name_the_late(stands)

    def leave(self) -> None:
        """This rank's program has ended: tell it, and on rank 0 wait until all ranks' have.

        Raises:
            BactrianError: as `look`.
        """
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._log.has_ended:
            self._log.note(ENDED)
        self.look()
        while self._control.rank == 0 and not self._all_have_ended():
            time.sleep(_LEAVE_SECONDS)
            self.look()

    def _all_have_ended(self) -> bool:
        reports = self._reports.values()
        return len(reports) == self._control.size and all(report.last == ENDED for report in reports)

    def _look_on(self) -> None:
        try:
            while not self._over.wait(_LOOK_SECONDS):
                self.look()
        except BactrianError as error:
            end_job(error)

    def _name_the_late(self, stands: bool) -> None:
        """Say once for whom rank 0 waits in a call, when that takes long."""
        now, here = time.monotonic(), self._log.count
        if not stands:
            self._since = now
        if now - self._since < _LATE_SECONDS or self._named == here or self._told != here:
            return
        told = {rank: self._reports.get(rank) for rank in range(self._control.size)}
        late = {rank: report for rank, report in told.items() if report is None or report.num_calls < here}
        if late:
            self._named = here
            words = [
                _where(report) if report else f"rank {rank}: nothing was heard of it" for rank, report in late.items()
            ]
            _log.warning(
                "rank 0 has waited %.0f s at %s; %s %s not come so far; last seen: %s",
                now - self._since,
                self._reports[0].line or "its end",
                _ranks(list(late)),
                "has" if len(late) == 1 else "have",
                "; ".join(words[:_MOST_NAMED]),
            )


def refuse_different(reports: Mapping[int, Report]) -> None:
    """Refuse ranks of which two have made different calls where both remember theirs.

    Args:
        reports: of some ranks, the newest of each.

    Raises:
        RuntimeFault: names who calls what.
        ConfigError: the call is the same, and its arguments are not.
    """
    starts = sorted({number for report in reports.values() for number, _ in report.starts()})
    for number in starts:  # between two of them, no rank changes what it calls
        groups: dict[CollectiveCall, list[int]] = {}
        for rank, report in sorted(reports.items()):
            call = report.call(number)
            if call is not None:
                groups.setdefault(call, []).append(rank)
        if len(groups) > 1:
            raise _difference(number, groups, reports)


def _difference(
    number: int, groups: Mapping[CollectiveCall, list[int]], reports: Mapping[int, Report]
) -> BactrianError:
    ordered = sorted(
        groups.items(), key=lambda group: (len(group[1]), group[0].kind == "step", group[0] != ENDED, group[1])
    )
    where = "; ".join(_where(reports[ranks[0]]) for _, ranks in ordered[:_MOST_NAMED])
    names, kinds, details = (len(set(each)) for each in zip(*((c.name, c.kind, c.detail) for c in groups), strict=True))
    if names == 1 and (details > 1 or kinds == 1):
        has = [
            f"{_ranks(ranks)} {_has(ranks)} {call.detail if details > 1 else 'a state of its own'}"
            for call, ranks in sorted(ordered, key=lambda group: group[1])
        ]
        return ConfigError(
            f"ranks differ in the arguments of {ordered[0][0].name}: {', '.join(has)}",
            where=where,
            why="every rank makes the same calls with the same shapes and dtypes",
            fix="give every rank the same batches; pad or leave out a last one that is smaller",
        )
    calls = [_calls(call, ranks, reports[ranks[0]], number) for call, ranks in ordered]
    return RuntimeFault(
        f"{calls[0]}, but {', '.join(calls[1:])}",
        where=where,
        why=f"steps, their compilation and `gather` are calls that all ranks make together; {number} before were alike",
        fix="give the loops of all ranks as many steps, and let all end together"
        if all(call.kind in ("step", "end") for call in groups)
        else "make the call on every rank, outside of `if bactrian.is_main_rank()`, and use its result on one",
    )


def _calls(call: CollectiveCall, ranks: Sequence[int], report: Report, number: int) -> str:
    """What some ranks call, in words; ``report`` is the first one's."""
    one = len(ranks) == 1
    match call.kind:
        case "end":
            return f"{_ranks(ranks)} {_has(ranks)} ended {'its' if one else 'their'} program"
        case "step":
            step = f"step {report.number} of " if number == report.num_calls - 1 else ""
            return f"{_ranks(ranks)} {'is' if one else 'are'} in {step}{call.name}"
        case kind:
            return f"{_ranks(ranks)} {kind}{'s' * one} {call.name}"


def _where(report: Report) -> str:
    return f"rank {report.rank} on {report.host}{': ' * bool(report.line)}{report.line}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown, more = [str(rank) for rank in ranks[:_MOST_NAMED]], len(ranks) - _MOST_NAMED
    if more > 0:
        return f"ranks {', '.join(shown)} and {more} more"
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def end_job(error: BactrianError) -> None:
    """End the job for an error that no line of the user's program has raised."""
    threading.excepthook(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))


T = TypeVar("T")

_MAIN_THREAD = threading.main_thread().ident
_calls_made = CallLog()
_watch: Watch | None = None


def note(call: CollectiveCall) -> None:
    """The call begins. What other threads than the main one call is not compared: its order may differ."""
    if threading.get_ident() == _MAIN_THREAD:
        _calls_made.note(call)


def exchange(control: Control, value: T) -> list[T]:
    """Every rank's value by rank, once it is seen that all ranks make the call that was noted last (collective).

    What ranks tell each other beside steps begins with it, so that no two such calls are taken for each other.

    Raises:
        RuntimeFault: ranks make different calls.
        ConfigError: ranks make the same call with different arguments.
    """
    if control.size == 1:
        return [value]
    told = control.allgather((_calls_made.report(control.rank, "" if _watch is None else _watch.line()), value))
    refuse_different({report.rank: report for report, _ in told})
    return [value for _, value in told]


def watch(control: Control, line: Callable[[], str]) -> None:
    """Begin to compare the ranks' calls, the first time (collective).

    Where MPI serves one thread at a time, nothing is compared.

    Args:
        control: of all ranks.
        line: gives the user's line that the main thread is at.
    """
    global _watch
    if _watch is None and control.size > 1 and control.serves_threads:
        _watch = Watch(control.duplicate(), _calls_made, line)
        _watch.start()


def leave(control: Control) -> None:
    """The program of this rank has ended, and MPI is about to; returns once no rank can need an answer any more."""
    watch(control, lambda: "")
    if _watch is not None:
        try:
            _watch.leave()
        except BactrianError as error:
            end_job(error)
