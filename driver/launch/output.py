"""What the ranks print, passed on to where the launcher's own output goes."""

from __future__ import annotations

import os
import select
import selectors
from typing import IO, Protocol


def write(descriptor: int, data: bytes) -> None:
    """Write all of it. What can't be written is left out: the reader may have gone, and the job does not depend on it."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # a program that shares the terminal made it so
            select.select([], [descriptor], [])
        except OSError:
            return


def is_unread(descriptor: int) -> bool:
    """Whether nobody reads any more what is written to it, a pipe."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class Filter(Protocol):
    """What passes bytes on, and may hold some back."""

    def feed(self, data: bytes) -> bytes:
        """What may be printed now."""
        ...

    def finish(self) -> bytes:
        """What is left at the end."""
        ...


class Relay:
    """Passes on what comes through a pipe.

    Attributes:
        found: whether ``phrase`` has come.
    """

    def __init__(
        self, source: IO[bytes], target: int, passing: Filter, selector: selectors.BaseSelector, *, phrase: bytes = b""
    ) -> None:
        """The selector's key gets a function to call as its data."""
        self._source, self._target, self._passing, self._selector = source, target, passing, selector
        self._phrase, self._recent = phrase, b""
        self.found = False
        os.set_blocking(source.fileno(), False)
        selector.register(source, selectors.EVENT_READ, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._source.fileno(), 65536)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(self._source)
            return
        if self._phrase:
            self._recent += data
            self.found = self.found or self._phrase in self._recent
            self._recent = self._recent[-len(self._phrase) :]
        write(self._target, self._passing.feed(data))

    def finish(self) -> None:
        """Print what was held back, and close the pipe."""
        write(self._target, self._passing.finish())
        self._source.close()
