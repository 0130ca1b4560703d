"""What mpirun and Gloo print of their own, taken out of what the ranks' output is."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RULE = re.compile(rb"^(-{60,}|={60,})\s*$")
_PHRASES = (b"MPI_ABORT was invoked", b"prterun", b"mpirun", b"PRTE", b"mpiexec", b"BAD TERMINATION", b"Primary job")
# The first two: Open MPI's launcher may trip over an assertion of its own while it ends a job at start-up. Its lines are
# matched by their full form, since a user's may begin with a bracket as well.
_SINGLE = re.compile(
    rb"^(prterun: \S+:\d+: .*Assertion"
    rb"|\[[\w.-]+:\d+\] (\*\*\* (Process received signal|End of error message) \*\*\*|Signal: |Signal code: |\[ ?\d+\] /)"
    rb"|Abort\(\d+\) on node \d+|application called MPI_Abort\(|\[proxy:|\[mpiexec@|YOUR APPLICATION TERM)"
)
# JAX's coordination service has lost a process. What follows are dumps of the others, which it ends for that.
_COORDINATION = re.compile(rb"^[EF]\d{4} [\d:.]+ +\d+ (coordination_service_agent\.cc|client\.h):\d+\]")
_MOST_LINES = 40
_FIRST_LINES = 4  # of a block, the rule included: here a banner says whose it is


_KILLED = re.compile(r"process rank (\d+) with PID \d+ on node \S+ exited on\s+signal \d")
_GAVE_UP = re.compile(r'process rank (\d+) with PID \d+ on node \S+ calling\s+"abort"')
_ABORTED = re.compile(
    r"MPI_ABORT was invoked on rank (?P<rank>\d+)[^-]*?Errorcode: (?P<code>\d+)"
    r"|^Abort\((?P<code_>\d+)\) on node \d+ \(rank (?P<rank_>\d+) in comm \d+\): application called MPI_Abort",
    re.M,
)


@dataclass(frozen=True)
class Blamed:
    """What mpirun says of a rank for which it has ended the job.

    Attributes:
        killed: the rank that a signal has ended.
        gave_up: the rank that MPI ended by itself, since it has lost another; not the cause.
        aborted: the rank that called ``MPI_Abort``, with what code.
    """

    killed: int | None = None
    gave_up: int | None = None
    aborted: tuple[int, int] | None = None


def blamed(banners: str) -> Blamed:
    """Read it in what was dropped."""
    if found := _KILLED.search(banners):
        return Blamed(killed=int(found[1]))
    if found := _ABORTED.search(banners):
        return Blamed(aborted=(int(found["rank"] or found["rank_"]), int(found["code"] or found["code_"])))
    found = _GAVE_UP.search(banners)
    return Blamed(gave_up=int(found[1]) if found else None)


class BannerFilter:
    """Passes bytes on as they come, but holds what may be a banner: from one long rule to the next.

    A block is dropped when its first lines speak of mpirun, else passed on. So is everything from the line on with which
    JAX's coordination service ends a job. What was dropped is in ``dropped``.
    """

    def __init__(self) -> None:
        self.dropped = b""
        self._line = b""  # begun, not passed on
        self._begun = False  # the beginning of the present line has been passed on
        self._block: list[bytes] = []
        self._ending = False  # the coordination service has spoken

    def feed(self, data: bytes) -> bytes:
        """What may be printed now."""
        data = data.replace(b"\0", b"")  # mpirun ends its banners with one
        if self._ending:
            self.dropped += data
            return b""
        passed = b""
        *lines, rest = (self._line + data).split(b"\n")
        for line in lines:
            passed += self._take(line + b"\n")
        if self._ending:
            self.dropped, rest = self.dropped + rest, b""
        self._line = rest
        if rest and not self._block and not rest.startswith((b"-", b"=", b"[", b"A", b"a", b"Y")):
            passed, self._line, self._begun = passed + rest, b"", True  # a prompt or a progress bar
        return passed

    def release(self) -> bytes:
        """What was held and is no banner so far; call it when nothing has come for a while."""
        if self._is_banner():
            return b""
        passed = b"".join(self._block) + self._line
        if passed:
            self._begun = bool(self._line)
        self._block, self._line = [], b""
        return passed

    def finish(self) -> bytes:
        """What is left at the end."""
        block, self._block = b"".join(self._block) + self._line, []
        self._line = b""
        return self._sort(block) if block else b""

    def _take(self, line: bytes) -> bytes:
        self._ending = self._ending or _COORDINATION.match(line) is not None
        if self._ending:
            self.dropped += line
            return b""
        if self._begun:
            self._begun = False
            return line
        if self._block:
            self._block.append(line)
            ended = _RULE.match(line) or len(self._block) > _MOST_LINES
            if ended or (len(self._block) >= _FIRST_LINES and not self._is_banner()):
                block, self._block = b"".join(self._block), []
                return self._sort(block)
            return b""
        if _RULE.match(line):
            self._block = [line]
            return b""
        return self._sort(line) if _SINGLE.match(line) else line

    def _is_banner(self) -> bool:
        return any(phrase in line for line in self._block[:_FIRST_LINES] for phrase in _PHRASES)

    def _sort(self, block: bytes) -> bytes:
        lines = block.split(b"\n")[:_FIRST_LINES]
        if _SINGLE.match(block) or (_RULE.match(lines[0]) and any(p in line for line in lines for p in _PHRASES)):
            self.dropped += block
            return b""
        return block


_GLOO = b"[Gloo] Rank "


class GlooFilter:
    """Passes stdout on as it comes, but for the line that Gloo writes to it for each group of processes that it connects."""

    def __init__(self) -> None:
        self._line = b""  # begun as Gloo's may, not passed on
        self._begun = False  # the beginning of the present line has been passed on

    def feed(self, data: bytes) -> bytes:
        """What may be printed now."""
        passed = b""
        *lines, rest = (self._line + data).split(b"\n")
        for line in lines:
            if self._begun or not line.startswith(_GLOO):
                passed += line + b"\n"
            self._begun = False
        self._line = b"" if self._begun or not _may_become(rest, _GLOO) else rest
        if not self._line and rest:
            passed, self._begun = passed + rest, True
        return passed

    def finish(self) -> bytes:
        """What is left at the end."""
        line, self._line = self._line, b""
        return b"" if line.startswith(_GLOO) else line


def _may_become(text: bytes, beginning: bytes) -> bool:
    return bool(text) and (text.startswith(beginning) or beginning.startswith(text))
