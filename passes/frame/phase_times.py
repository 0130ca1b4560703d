"""Where the time of making a step goes: phases in their order, with the seconds that each took."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from bactrian.passes.frame.views import Viewable


@dataclass(frozen=True)
class PhaseTime:
    """A phase of making a step.

    Attributes:
        name: ``trace``, the name of a pass, ``compile``.
        seconds: by the clock, over all runs.
        runs: how often it ran.
        parts: phases within it; their seconds are among its own.
    """

    name: str
    seconds: float
    runs: int = 1
    parts: tuple[PhaseTime, ...] = ()


@dataclass(frozen=True)
class Timing(Viewable):
    """All phases of making a step, in the order in which they first ran."""

    phases: tuple[PhaseTime, ...]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)


class PhaseClock:
    """Measures phases one after another, and phases within phases.

    Example: after ``with clock.phase("read"): ...`` and ``with clock.phase("solve"): ...``, ``clock.phases`` are two.
    """

    def __init__(self) -> None:
        self._levels: list[list[PhaseTime]] = [[]]

    @property
    def phases(self) -> tuple[PhaseTime, ...]:
        """What was measured so far."""
        return merged(self._levels[0])

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Measure the block."""
        self._levels.append([])
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.add([PhaseTime(name, seconds, parts=merged(self._levels.pop()))])

    def add(self, phases: Iterable[PhaseTime]) -> None:
        """Add what was measured elsewhere."""
        self._levels[-1] += phases


def merged(phases: Iterable[PhaseTime]) -> tuple[PhaseTime, ...]:
    """The phases with those of equal names as one, at the place of the first.

    Example: ``cse`` 1 s, ``verify`` 2 s and ``cse`` 3 s are ``cse`` 4 s in two runs, and ``verify`` 2 s.
    """
    known: dict[str, PhaseTime] = {}
    for phase in phases:
        before = known.get(phase.name, PhaseTime(phase.name, 0.0, 0))
        known[phase.name] = PhaseTime(
            phase.name,
            before.seconds + phase.seconds,
            before.runs + phase.runs,
            merged((*before.parts, *phase.parts)),
        )
    return tuple(known.values())
