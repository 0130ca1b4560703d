"""The predicted step as a Chrome trace, in the form of those that runs write, with the memory of each mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from bactrian.driver.planning.simulated_step import pipeline_of
from bactrian.driver.planning.stage_memory import memory_over_time
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.pipelining.pipeline_events import Pipeline, PipelineTimes, simulate
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.timeline import Event, bar, flow, write_trace
from bactrian.runtime.unrolled_step import UnrolledStep


def write_predicted_trace(
    path: str | Path, plan: Plan, program: StagedProgram, functions: Mapping[str, FunctionMemory]
) -> None:
    """Write the predicted step as a Chrome trace: stage ``s`` is rank ``s``.

    Args:
        path: the file.
        plan: of the step.
        program: in stages.
        functions: the memory of each stage function, by its symbol.

    Raises:
        ConfigError: no times were predicted; the file can't be written.
    """
    pipeline = pipeline_of(plan, program)
    if pipeline is None:
        raise ConfigError(
            "cannot write the predicted trace: no times were predicted",
            why=f"nothing is known of the speed of {plan.platform} devices",
            fix="name a cluster file with --cluster",
        )
    step, times = UnrolledStep(program), simulate(pipeline)
    events = [*_bars(pipeline, times), *_messages(pipeline, times)]
    for stage in range(program.num_stages):
        held = memory_over_time(step, stage, functions)
        for begin, nbytes in zip(times.begins[stage], held, strict=True):
            row: Event = {"pid": stage, "tid": stage, "name": "memory", "ph": "C", "cat": "memory"}
            events.append({**row, "ts": begin * 1e6, "args": {"bytes": nbytes}})
    write_trace(path, events)


def _bars(pipeline: Pipeline, times: PipelineTimes) -> Iterator[Event]:
    for mesh, tasks in enumerate(pipeline.order):
        for task, begin, end in zip(tasks, times.begins[mesh], times.ends[mesh], strict=True):
            name = pipeline.functions[task.call].name
            yield bar(mesh, mesh, name, task.microbatch, begin * 1e6, end * 1e6, "run")


def _messages(pipeline: Pipeline, times: PipelineTimes) -> Iterator[Event]:
    """A bar where a message is ready, and one where its reader waits for it, without length where it does not wait."""
    begins = {
        task: begin
        for tasks, row in zip(pipeline.order, times.begins, strict=True)
        for task, begin in zip(tasks, row, strict=True)
    }
    waits = {wait.task: wait.begin for wait in times.waits}
    for number, each in enumerate(times.messages):
        receiver, sender = pipeline.functions[each.reader.call].mesh, each.source
        microbatch = each.reader.microbatch if each.sender is None else each.sender.microbatch
        read = begins[each.reader]
        ready, end = each.ready * 1e6, read * 1e6
        begin = waits.get(each.reader, read) * 1e6 if each.arrive == read else end
        yield bar(sender, sender, f"SEND to rank {receiver}", microbatch, ready, ready, "send")
        yield flow(sender, sender, "s", str(number), ready)
        yield bar(receiver, receiver, f"RECV from rank {sender}", microbatch, begin, end, "arrive")
        yield flow(receiver, receiver, "f", str(number), end)
