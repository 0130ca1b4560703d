"""What is measured of one stage function, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.peak.estimate import FunctionMemory


@dataclass(frozen=True)
class FunctionProfile:
    """A function that ran: the median of its seconds, and what XLA needs on each device."""

    seconds: float
    memory: FunctionMemory


@dataclass(frozen=True)
class FunctionFailure:
    """A function that can't run.

    Attributes:
        reason: why.
        may_pass: another time it may run: this host was busy, or had no memory left.
    """

    reason: str
    may_pass: bool = False


Measured = FunctionProfile | FunctionFailure
