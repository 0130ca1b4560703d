"""1F1B: one forward, one backward."""

from __future__ import annotations

from typing import ClassVar

from bactrian.passes.schedules.schedule import Schedule, StageOrder


class OneFOneB(Schedule):
    """One forward, one backward (Narayanan et al. 2019, PipeDream-Flush).

    Stage ``s`` of ``S`` runs ``S - 1 - s`` forwards ahead, then alternates, so that it never holds the activations of
    more than ``min(m, S - s)`` of ``m`` microbatches. With ``f`` and ``b`` seconds forward and backward of a microbatch
    on every stage, a step takes ``(m + S - 1) (f + b)`` where transfers take no time.

    >>> OneFOneB().order(2, 3)
    (('F0', 'F1', 'B0', 'F2', 'B1', 'B2'), ('F0', 'B0', 'F1', 'B1', 'F2', 'B2'))
    """

    name: ClassVar[str] = "1f1b"

    def num_ahead(self, stage: int, num_stages: int) -> int:
        """The forwards that a stage runs before its first backward's own: one for each stage that comes after."""
        return num_stages - 1 - stage

    def stage_order(self, stage: int, num_stages: int, num_microbatches: int) -> StageOrder:
        """Forwards ahead, then a forward and a backward in turn, then the backwards that are left."""
        ahead = min(self.num_ahead(stage, num_stages), num_microbatches)
        tokens = [f"F{m}" for m in range(ahead)]
        for m in range(num_microbatches):
            if m + ahead < num_microbatches:
                tokens.append(f"F{m + ahead}")
            tokens.append(f"B{m}")
        return tuple(tokens)

    def in_flight(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Those ahead and one more, as far as there are so many."""
        return min(num_microbatches, self.num_ahead(stage, num_stages) + 1)

    def fuses(self, stage: int, num_stages: int) -> bool:
        """The last stage: it runs no forward ahead."""
        return stage == num_stages - 1
