"""How the stages of a plan were found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.plan.json_fields import add_record

FOUND = "auto"
"""What a user says of a decision that is to be found."""


@dataclass(frozen=True)
class TriedMicrobatches:
    """A number of microbatches for which a pipeline was searched: the best one, simulated, or why there is none."""

    num_microbatches: int
    schedule: str = ""
    step_seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class OtherPipeline:
    """A pipeline of another number of stages, for the same number of microbatches, and what its step takes, simulated."""

    num_stages: int
    schedule: str
    step_seconds: float


@dataclass(frozen=True)
class PipelineRecord:
    """What was searched.

    ``step_seconds`` is what the search's closed form has for a step, ``bound_seconds`` what it has proved of all others of
    the same number of microbatches, ``simulated_seconds`` what its events take. All are of the options that the layers
    had, whose working memory is rounded up where there are more than a few. ``fixed`` names what the user decided,
    ``most_layers`` is what the program was grouped with, ``num_devices`` what the cluster has. ``next_best`` is the fastest
    pipeline of another number of stages, if any came close. ``profile_rounds`` is how often it was searched and measured.
    """

    step_seconds: float
    bound_seconds: float
    simulated_seconds: float
    most_layers: int
    num_devices: int
    fixed: tuple[str, ...] = ()
    tried: tuple[TriedMicrobatches, ...] = ()
    next_best: OtherPipeline | None = None
    profile_rounds: int = 0

    @property
    def gap(self) -> float:
        """By how much the step is above its bound, as a share of the step."""
        return 1 - self.bound_seconds / self.step_seconds if self.step_seconds else 0.0


add_record(TriedMicrobatches, "a list of numbers of microbatches")
add_record(OtherPipeline, "an object, or null")
add_record(PipelineRecord, "an object, or null")
