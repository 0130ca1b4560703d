"""The unrolled step: its tasks, what they read and write, and simulations with costs of any kind."""

from __future__ import annotations

import random

import pytest
from staged_programs import Builder, chain, random_program

from bactrian.passes.frame.errors import PassError
from bactrian.passes.pipelining.pipeline_events import ONCE, Task
from bactrian.runtime.staged_program import Call
from bactrian.runtime.unrolled_step import UnrolledStep, relative_cost, simulate


def forwards(stages: int, microbatches: int) -> UnrolledStep:
    """A batch that goes through so many stages."""
    b = Builder()
    value = b.argument(0, "batch", 0, (2,))
    for stage in range(stages):
        out = b.value(stage, (2,), each=True)
        b.call(f"stage{stage}.forward", (value,), (out,), stage, "forward")
        value = b.move(out, stage + 1) if stage + 1 < stages else out
    return UnrolledStep(b.program("gpipe", (tuple(f"F{m}" for m in range(microbatches)),) * stages, microbatches))


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (3, 1), (1, 4), (3, 5)])
def test_a_pipeline_takes_its_fill_and_its_slowest_stage(stages: int, microbatches: int) -> None:
    step = forwards(stages, microbatches)
    assert max(simulate(step, tuple(range(stages)), lambda call: 1.0).values()) == microbatches + stages - 1
    assert max(simulate(step, (0,) * stages, lambda call: 1.0).values()) == microbatches * stages

    def last_is_slow(call: Call) -> float:
        return 10.0 if call.stage == stages - 1 else 1.0

    assert max(simulate(step, tuple(range(stages)), last_is_slow).values()) == stages - 1 + 10 * microbatches


def test_costs_in_forwards() -> None:
    calls = {call.phase: relative_cost(call) for call in chain(2, 2).calls}
    assert calls == {"initialize": 1, "forward": 1, "backward": 2, "forward_backward": 3, "update": 1}


@pytest.mark.parametrize("seed", range(20))
def test_any_costs_give_a_valid_order(seed: int) -> None:
    program, ranks = random_program(seed)
    step, costs = UnrolledStep(program), random.Random(seed)
    end = simulate(step, ranks, lambda call: costs.choice((0.0, 0.5, 7.0)))
    assert sorted(end) == sorted(task for tasks in step.stage_tasks for task in tasks)
    done = set[Task]()
    for task in end:
        made_by = {step.producer[key] for key in map(step.origin, step.reads[task]) if key in step.producer}
        assert made_by <= done
        assert all(end[before] <= end[task] for before in made_by)
        done.add(task)


def test_what_is_made_once_is_made_right_before_its_first_reader() -> None:
    step = UnrolledStep(chain(2, 3))
    functions = [step.call(task).function for task in step.stage_tasks[0]]
    assert functions[:4] == ["stage0.forward", "stage0.forward", "stage0.initialize", "stage0.backward"]
    assert [task.microbatch for task in step.stage_tasks[0]][:4] == [0, 1, ONCE, 0]


def test_orders_that_wait_for_each_other_are_refused() -> None:
    b = Builder()
    x = b.argument(0, "batch", 0, (2,))
    y, back = b.value(1, (2,), each=True), b.value(0, (2,), each=True)
    first = b.value(0, (2,), each=True)
    b.call("stage0.forward", (x,), (first,), 0, "forward")
    b.call("stage1.forward", (b.move(first, 1),), (y,), 1, "forward")
    b.call("stage0.backward", (b.move(y, 0),), (back,), 0, "backward")
    step = UnrolledStep(b.program("gpipe", (("B0", "F0"), ("F0",)), 1))
    with pytest.raises(PassError, match="the order of work of the stages can't be carried out") as error:
        simulate(step, (0, 1), relative_cost)
    assert "stage 0: stage0.backward of microbatch 0 waits for stage1.forward of microbatch 0" in error.value.why
