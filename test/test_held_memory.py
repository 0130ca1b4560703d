"""Memory of a device as a step goes on, against the buffers of the unrolled step, one by one."""

from __future__ import annotations

import itertools

import pytest
from staged_programs import ROWS, WIDTH, chain
from test_html_report import chain_plan

from bactrian.driver.planning.held_memory import HeldMemory, held_memory
from bactrian.driver.planning.simulated_step import simulated
from bactrian.passes.pipelining.pipeline_events import PipelineTimes
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import INDEX, UnrolledStep


def held_by_chain(
    num_stages: int, num_microbatches: int, schedule: str
) -> tuple[StagedProgram, PipelineTimes, tuple[HeldMemory, ...]]:
    program = chain(num_stages, num_microbatches, schedule)
    _, times = simulated(chain_plan(num_stages, num_microbatches, schedule=schedule), program)
    assert times is not None
    return program, times, held_memory(program, times)


def buffers(program: StagedProgram, times: PipelineTimes, stage: int) -> dict[tuple[int, int], tuple[float, float]]:
    """When each buffer that does not last is there: (value, microbatch) -> from, to. An accumulator is one buffer."""
    step = UnrolledStep(program)
    initial = {c.inputs[read]: c.outputs[made] for c in program.calls for read, made in c.carries}
    state = {p.value for p in program.arguments if p.role != "batch"} | {
        p.value for p in program.results if p.updates is not None
    }
    spans = dict[tuple[int, int], tuple[float, float]]()
    for task, begin, end in zip(step.stage_tasks[stage], times.begins[stage], times.ends[stage], strict=True):
        for key in (*step.reads[task], *step.writes[task]):
            if key.value != INDEX and key.value not in state:
                value = initial.get(key.value, key.value)
                buffer = value, -1 if value in step.carried else key.microbatch
                spans[buffer] = spans.get(buffer, (begin, end))[0], end
    kept = {p.value for p in program.results}
    return {key: (begin, times.seconds if key[0] in kept else end) for key, (begin, end) in spans.items()}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 3), (3, 5)])
def test_a_device_holds_the_buffers_that_are_there(num_stages: int, num_microbatches: int, schedule: str) -> None:
    program, times, found = held_by_chain(num_stages, num_microbatches, schedule)
    for stage, held in enumerate(found):
        spans = buffers(program, times, stage)
        for (begin, nbytes), (end, _) in itertools.pairwise(held.points):
            there = [value for (value, _), (first, last) in spans.items() if first < (begin + end) / 2 < last]
            if end > begin:
                assert nbytes == held.lasting + sum(program.values[value].nbytes for value in there)
        assert len(held.points) > num_microbatches + 1


def test_each_microbatch_in_flight_keeps_its_input_and_its_residual() -> None:
    fullest = [held_by_chain(2, count, "gpipe")[2][0].most for count in (3, 4, 5)]
    assert [after - before for before, after in itertools.pairwise(fullest)] == [2 * ROWS * WIDTH * 4] * 2
    assert held_by_chain(2, 4, "1f1b")[2][0].most == held_by_chain(2, 9, "1f1b")[2][0].most


def test_state_lasts() -> None:
    first, second = held_by_chain(2, 3, "1f1b")[2]
    assert first.lasting == (WIDTH * WIDTH + WIDTH) * 4  # its weight and the shared state
    assert second.lasting == WIDTH * WIDTH * 4
