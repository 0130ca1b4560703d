"""What a pipeline schedule is. No MLIR, no jax.

A token names what a stage does next: ``"F3"`` is the forward of microbatch 3, ``"B3"`` its backward, ``"FB3"`` both in
one call, on a stage whose forward and backward are one function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from bactrian.passes.frame.errors import ConfigError

StageOrder = tuple[str, ...]  # of one stage
Order = tuple[StageOrder, ...]  # by stage


class Schedule(ABC):
    """In which order each stage runs its forwards and backwards.

    A schedule is one class in a file of its own, with a line in ``by_name.SCHEDULES``. Nothing else knows its name.
    """

    name: ClassVar[str]

    @abstractmethod
    def stage_order(self, stage: int, num_stages: int, num_microbatches: int) -> StageOrder:
        """A stage's forwards and backwards in order, each microbatch's once: ``F`` and ``B`` tokens.

        Over all stages the order must be possible: a forward waits for that of the stage before, a backward for that of
        the stage after.
        """

    @abstractmethod
    def fuses(self, stage: int, num_stages: int) -> bool:
        """Whether a stage's forward and backward are one function. Only where each backward directly follows its forward."""

    def order(self, num_stages: int, num_microbatches: int) -> Order:
        """The order of every stage.

        Raises:
            ConfigError: a count is below one.
        """
        if num_stages < 1 or num_microbatches < 1:
            raise ConfigError(
                f"a schedule needs at least 1 stage and 1 microbatch, not {num_stages} and {num_microbatches}"
            )
        return tuple(self.stage_order(stage, num_stages, num_microbatches) for stage in range(num_stages))

    def in_flight(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """The most microbatches whose activations a stage holds at once."""
        return peak_in_flight(self.stage_order(stage, num_stages, num_microbatches))


def fused(order: StageOrder) -> StageOrder:
    """The order of a stage whose forward and backward are one function: it runs in the place of the forward.

    >>> fused(("F0", "B0", "F1", "B1"))
    ('FB0', 'FB1')
    """
    tokens = map(parse_token, order)
    return tuple(f"FB{microbatch}" for kind, microbatch in tokens if kind == "F")


def parse_token(token: str) -> tuple[str, int]:
    """Kind and microbatch of a token.

    >>> parse_token("FB12")
    ('FB', 12)
    """
    kind = token.rstrip("0123456789")
    if kind not in ("F", "B", "FB") or kind == token:
        raise ConfigError(f"no such token: {token!r}", fix="tokens are F<m>, B<m> and FB<m>")
    return kind, int(token[len(kind) :])


def peak_in_flight(order: Sequence[str]) -> int:
    """Most microbatches whose forward has begun and whose backward has not ended, for one stage's order.

    >>> peak_in_flight(("F0", "F1", "B0", "B1"))
    2
    """
    live = peak = 0
    for token in order:
        kind = parse_token(token)[0]
        live += kind != "B"
        peak = max(peak, live)
        live -= kind != "F"
    return peak
