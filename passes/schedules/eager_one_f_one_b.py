"""Eager 1F1B: 1F1B with twice as many forwards ahead."""

from __future__ import annotations

from typing import ClassVar

from bactrian.passes.schedules.one_f_one_b import OneFOneB


class EagerOneFOneB(OneFOneB):
    """1F1B with twice as many forwards ahead, so that a stage need not wait for transfers (Zhuang et al. 2023, "On
    optimizing the communication of model parallelism", section 4).

    Stage ``s`` of ``S`` runs ``2 (S - 1 - s)`` forwards ahead, and never holds the activations of more than
    ``min(m, 2 (S - s) - 1)`` of ``m`` microbatches. With ``f`` and ``b`` seconds forward and backward of a microbatch
    on every stage, a step takes ``(m + S - 1) (f + b)``, as with 1F1B, where transfers take no time. Between two
    neighbours, 1F1B has one microbatch more on the first than on the second, which the round trip ``f + b + 2 x`` with
    ``x`` seconds of a transfer holds up; here there are two more, so that transfers of up to ``(f + b) / 2`` cost
    nothing but the fill and the drain.

    >>> EagerOneFOneB().order(2, 3)
    (('F0', 'F1', 'F2', 'B0', 'B1', 'B2'), ('F0', 'B0', 'F1', 'B1', 'F2', 'B2'))
    """

    name: ClassVar[str] = "eager-1f1b"

    def num_ahead(self, stage: int, num_stages: int) -> int:
        """Two for each stage that comes after."""
        return 2 * (num_stages - 1 - stage)
