"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from typing import ClassVar

from bactrian.passes.schedules.schedule import Schedule, StageOrder


class GPipe(Schedule):
    """All forwards, then all backwards (Huang et al. 2019, GPipe). Every stage holds all microbatches' activations.

    With ``f`` and ``b`` seconds forward and backward of a microbatch on each of ``S`` stages, a step of ``m``
    microbatches takes ``(m + S - 1) (f + b)`` where transfers take no time.

    >>> GPipe().order(2, 2)
    (('F0', 'F1', 'B0', 'B1'), ('F0', 'F1', 'B0', 'B1'))
    """

    name: ClassVar[str] = "gpipe"

    def stage_order(self, stage: int, num_stages: int, num_microbatches: int) -> StageOrder:
        """The same on every stage."""
        microbatches = range(num_microbatches)
        return (*(f"F{m}" for m in microbatches), *(f"B{m}" for m in microbatches))

    def in_flight(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """All of them."""
        return num_microbatches

    def fuses(self, stage: int, num_stages: int) -> bool:
        """No stage: the other forwards come between a forward and its backward."""
        return False
