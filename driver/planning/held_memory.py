"""What the devices of each stage hold as a simulated step goes on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

from bactrian.driver.planning.stage_memory import buffer_spans
from bactrian.passes.pipelining.pipeline_events import PipelineTimes
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import UnrolledStep


@dataclass(frozen=True)
class HeldMemory:
    """Bytes of a device of one stage.

    Attributes:
        lasting: there during the whole step: state and constants.
        points: seconds from the beginning of the step, each with the bytes from then on, ``lasting`` among them.
    """

    lasting: int
    points: tuple[tuple[float, int], ...]

    @property
    def most(self) -> int:
        """At the fullest moment."""
        return max((nbytes for _, nbytes in self.points), default=self.lasting)


def held_memory(program: StagedProgram, times: PipelineTimes) -> tuple[HeldMemory, ...]:
    """What a device of each stage holds, as far as functions give it to each other.

    A value is there from its first function on the stage, which makes or reads it, until its last reader there has ended.
    An accumulator is one buffer from its first microbatch to the update, and the next value of a state takes the place of
    the old one. Copies and temporaries of functions are not counted.

    Args:
        program: in stages.
        times: of a simulated step, whose functions are the program's calls.
    """
    step = UnrolledStep(program)
    return tuple(_held(step, times, stage) for stage in range(program.num_stages))


def _held(step: UnrolledStep, times: PipelineTimes, stage: int) -> HeldMemory:
    program, begins, ends = step.program, times.begins[stage], (*times.ends[stage], times.seconds)
    sizes = dict(program.mesh(stage))
    replaced = {piece.value for piece in program.results if piece.updates is not None}
    lasting, changes = 0, defaultdict[float, int](int)
    for key, (first, last) in buffer_spans(step, stage).items():
        value = program.values[key.value]
        nbytes = value.nbytes // value.spec.num_shards(sizes)
        if first < 0:
            lasting += nbytes
        elif key.value not in replaced:
            # Where a function adds to an accumulator, its result takes the place of what it read.
            changes[ends[first] if key.value in step.carried else begins[first]] += nbytes
            changes[ends[last]] -= nbytes
    moments = sorted(changes)
    totals = accumulate((changes[moment] for moment in moments), initial=lasting)
    return HeldMemory(lasting, tuple(zip((0.0, *moments), totals, strict=True)))
