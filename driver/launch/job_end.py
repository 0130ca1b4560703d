"""What is said of how a job of several ranks ended, and the exit code for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from bactrian.driver.launch.banners import blamed
from bactrian.passes.frame.errors import ConfigError, RuntimeFault

PEER_LOST = RuntimeFault.exit_code
_INTERRUPTED = 130  # KeyboardInterrupt


@dataclass(frozen=True)
class Failure:
    """A rank that told why it ends the job.

    Attributes:
        name: of the rank.
        code: to exit with.
        text: for the user; nothing after `sys.exit`.
    """

    name: str
    code: int
    text: str


@dataclass(frozen=True)
class Loss:
    """A rank that was gone before its script had ended.

    Attributes:
        rank: its number.
        place: its name, and where it was last heard of.
        code: what it gave to `os._exit`; None if it did not call that.
    """

    rank: int
    place: str
    code: int | None = None


@dataclass(frozen=True)
class JobEnd:
    """All that is known once no rank is left.

    Attributes:
        num_ranks: how many were to be started.
        num_reported: how many of them reported to the launcher.
        code: of mpirun; 128 and a signal's number where it says that one has ended a rank.
        ends: of the ranks that did not end well, in the order in which they were heard of.
        codes: of the ranks that ended by themselves.
        stopped: the signal by which the launcher was told to stop; 0 for none.
        passed: other signals that were passed on to the ranks.
        forced: whether mpirun itself was ended by the launcher.
        unheard: whether a rank said that it can't reach the launcher.
        unread: whether nobody reads the ranks' stdout any more, for which mpirun ends.
        banners: what mpirun has printed of its own.
    """

    num_ranks: int
    num_reported: int
    code: int
    ends: Sequence[Failure | Loss] = ()
    codes: Sequence[int] = ()
    stopped: int = 0
    passed: Sequence[int] = ()
    forced: bool = False
    unheard: bool = False
    unread: bool = False
    banners: str = ""

    def told(self) -> tuple[int, str]:
        """The exit code and the text to print, the cause last."""
        cause = self.ends[0] if self.ends else None
        number = self._stop_signal(cause)
        if number:
            name = signal.Signals(number).name
            return 128 + number, f"bactrian: stopped by {name}: all {self.num_ranks} ranks were ended\n"
        if isinstance(cause, Failure):
            failures = [end for end in self.ends if isinstance(end, Failure)]
            return cause.code, "".join(f"bactrian: {heading}\n{text}" for heading, text in told(failures))
        if cause is not None:
            return self._of_loss()
        return self._of_mpirun()

    def _stop_signal(self, cause: Failure | Loss | None) -> int:
        """The signal that ended the job; 0 if none did: the ranks have failed or ended by themselves."""
        if isinstance(cause, Failure) and cause.code not in (_INTERRUPTED, PEER_LOST):
            return 0  # in what it did after the signal
        if self.stopped:
            return self.stopped if cause or self.code else 0
        return self.code - 128 if isinstance(cause, Loss) and self.code - 128 in self.passed else 0

    def _of_loss(self) -> tuple[int, str]:
        says, losses = blamed(self.banners), [end for end in self.ends if isinstance(end, Loss)]
        if says.aborted:
            rank, code = says.aborted
            if place := next((loss.place for loss in losses if loss.rank == rank), ""):
                return code or PEER_LOST, f"bactrian: {place}, called MPI_Abort with {code}\n"
        if self.unread and says.killed is None and losses[0].code is None:
            text = "bactrian: nobody reads the ranks' output any more; mpirun ended them for that\n"
            return 128 + signal.SIGPIPE, text
        # Losses on several hosts may be heard of in another order.
        losses = [loss for loss in losses if loss.rank != says.gave_up] or losses
        loss = next((loss for loss in losses if loss.rank == says.killed), losses[0])
        if loss.code is not None:
            return loss.code or PEER_LOST, f"bactrian: {loss.place}, called os._exit({loss.code})\n"
        number = self.code - 128 if self.code > 128 else -self.code
        cause = "its process ended without a word"
        if not self.forced and number in set(signal.Signals):
            cause = f"killed by signal {number} ({signal.Signals(number).name})"
        why = self.banners if number == signal.SIGABRT else ""  # why it ended itself
        some = "" if self.num_reported == self.num_ranks else f"; {self._reported}"
        return PEER_LOST, f"{why}bactrian: lost {loss.place}: {cause}; the other ranks were ended{some}\n"

    def _of_mpirun(self) -> tuple[int, str]:
        """All ranks that reported have ended well, or none did report."""
        if self.code == 0:
            return max(self.codes, default=0), ""
        said = f"mpirun ended with exit code {self.code}"
        if self.num_reported:
            code = next((own for own in self.codes if own), self.code)
            return code, f"{self.banners}bactrian: {said}, {self._reported} and ended by themselves\n"
        if self.unheard:
            text = f"error: {said}; its ranks did run, but could not report here. What they printed stands above"
            return self.code, f"{self.banners}bactrian: {text}\n"
        text = "error: mpirun could not start the ranks; what it printed stands above"
        return ConfigError.exit_code, f"{self.banners}bactrian: {text}\n"

    @property
    def _reported(self) -> str:
        return f"{self.num_reported} of {self.num_ranks} ranks reported"


def told(failures: Sequence[Failure]) -> list[tuple[str, str]]:
    """What is said of ranks that failed, in the order in which they did: a heading and a text each, the cause last.

    Wrong options fail on every rank with the same words, which are said once.
    """
    alike = dict[tuple[int, str], list[str]]()
    for failure in failures:
        alike.setdefault((failure.code, failure.text), []).append(failure.name)
    found = list[tuple[str, str]]()
    for (code, text), names in reversed(alike.items()):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        does = f"called sys.exit({code})" if not text else "ended the job:" if code == PEER_LOST else "failed:"
        found.append((f"{names[0]}{others} {does}", text))
    return found
