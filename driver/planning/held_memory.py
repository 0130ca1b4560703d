"""What the devices of each stage hold as a simulated step goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bactrian.passes.pipelining.pipeline_events import PipelineTimes
from bactrian.runtime.staged_program import StagedProgram, Value
from bactrian.runtime.unrolled_step import stage_tasks

_Span = tuple[float, float]


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
    return tuple(_Holder(program, times, stage).held() for stage in range(program.num_stages))


class _Holder:
    """The buffers of one stage's devices."""

    def __init__(self, program: StagedProgram, times: PipelineTimes, stage: int) -> None:
        self._program, self._stage = program, stage
        self._sizes = dict(program.mesh(stage))
        self._spans = defaultdict[int, list[_Span]](list)  # call -> when it runs, by microbatch
        for task, begin, end in zip(stage_tasks(program, stage), times.begins[stage], times.ends[stage], strict=True):
            self._spans[task.call].append((begin, end))
        self._uses = defaultdict[int, list[int]](list)  # value -> its calls
        self._initial = dict[int, int]()  # accumulator -> its value before the first microbatch
        for number, call in enumerate(program.calls):
            if call.stage == stage:
                for value in dict.fromkeys((*call.inputs, *call.outputs)):
                    self._uses[value].append(number)
                self._initial |= {call.outputs[made]: call.inputs[read] for read, made in call.carries}
        self._kept = {piece.value for piece in program.results}
        self._end = times.seconds

    def held(self) -> HeldMemory:
        """All that a device holds."""
        lasting = {p.value for p in self._program.arguments if p.role != "batch"}
        replaced = {piece.value for piece in self._program.results if piece.updates is not None}
        passed_on = set(self._initial.values())
        here = [value for value in self._program.values if value.stage == self._stage]
        base = sum(map(self._nbytes, (value for value in here if value.id in lasting)))
        changes = defaultdict[float, int](int)
        for value in here:
            if value.id in self._uses and value.id not in lasting | replaced | passed_on:
                for begin, end in self._times_of(value):
                    changes[begin] += self._nbytes(value)
                    changes[end] -= self._nbytes(value)
        moments = sorted(changes)
        totals = accumulate((changes[moment] for moment in moments), initial=base)
        return HeldMemory(base, tuple(zip((0.0, *moments), totals, strict=True)))

    def _nbytes(self, value: Value) -> int:
        return value.nbytes // value.spec.num_shards(self._sizes)

    def _times_of(self, value: Value) -> Sequence[_Span]:
        """From when to when each buffer of a value is there."""
        uses = [*self._uses[self._initial.get(value.id, value.id)], *self._uses[value.id]]
        each = [number for number in uses if not self._program.calls[number].runs_once]
        last = self._end if value.id in self._kept else max(self._spans[number][-1][1] for number in uses)
        if value.id in self._initial or not value.per_microbatch or not each:
            return [(min(self._spans[number][0][0] for number in uses), last)]
        spans = [self._spans[number] for number in each]
        found = [(min(b for b, _ in turn), max(e for _, e in turn)) for turn in zip(*spans, strict=True)]
        found[-1] = found[-1][0], last  # what is done once per step reads the last microbatch's
        return found
