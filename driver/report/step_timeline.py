"""What each stage does when in a step: as predicted, and as the trace of a run has it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.pipelining.pipeline_events import ONCE, PipelineTimes, Task
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import stage_tasks

COMPUTING = ("prepare", "initialize", "forward", "backward", "forward_backward", "update")
TRANSFERRING = ("send", "receive")

_KIND_OF_CATEGORY = {"send": "send", "forward": "send", "arrive": "receive"}
_LABEL = re.compile(r"(?P<name>.*?)(?: m(?P<microbatch>\d+))?")


@dataclass(frozen=True)
class TimelineBar:
    """Something that a stage does.

    Attributes:
        kind: one of `COMPUTING` or `TRANSFERRING`.
        microbatch: None for what is done once per step.
        begin, end: seconds from the step's beginning.
    """

    kind: str
    microbatch: int | None
    begin: float
    end: float


@dataclass(frozen=True)
class TimelineRow:
    """What a stage does, on one rank where several share its mesh: its bars by their beginning."""

    stage: int
    name: str
    bars: tuple[TimelineBar, ...]

    def seconds_of(self, kinds: Iterable[str]) -> float:
        """Seconds of all bars of some kinds."""
        wanted = set(kinds)
        return sum(bar.end - bar.begin for bar in self.bars if bar.kind in wanted)

    @property
    def computing_seconds(self) -> float:
        """Seconds in which it computes."""
        return self.seconds_of(COMPUTING)


@dataclass(frozen=True)
class StepTimeline:
    """A step, stage by stage."""

    rows: tuple[TimelineRow, ...]

    @property
    def seconds(self) -> float:
        """When the last bar ends."""
        return max((bar.end for row in self.rows for bar in row.bars), default=0.0)

    @property
    def bubble_share(self) -> float:
        """The part of all stages' time in which they do not compute."""
        whole = self.seconds * len(self.rows)
        return 1 - sum(row.computing_seconds for row in self.rows) / whole if whole else 0.0


def predicted_timeline(program: StagedProgram, times: PipelineTimes) -> StepTimeline:
    """The step as it was simulated. A stage receives while it waits for a message that is under way."""
    bars: list[list[TimelineBar]] = [[] for _ in range(program.num_stages)]
    for stage in range(program.num_stages):
        spans = zip(stage_tasks(program, stage), times.begins[stage], times.ends[stage], strict=True)
        for task, begin, end in spans:
            if end > begin:
                bars[stage].append(_bar(program.calls[task.call].phase, task, begin, end))
    for stage, task, begin, end in times.waits:
        bars[stage].append(_bar("receive", task, begin, end))
    rows = (tuple(sorted(mine, key=lambda bar: bar.begin)) for mine in bars)
    return StepTimeline(tuple(TimelineRow(stage, f"stage {stage}", row) for stage, row in enumerate(rows)))


def _bar(kind: str, task: Task, begin: float, end: float) -> TimelineBar:
    return TimelineBar(kind, None if task.microbatch == ONCE else task.microbatch, begin, end)


def measured_timeline(path: str | Path, plan: Plan) -> StepTimeline:
    """The last step that a trace has as a whole.

    Args:
        path: written by ``compiled.write_trace``.
        plan: of the program that was traced.

    Raises:
        ConfigError: the file is no such trace, or is of another plan.
    """
    events = [event for event in _events(path) if event.get("ph") == "X"]
    by_row = defaultdict[tuple[int, int], list[dict[str, Any]]](list)
    try:
        for event in sorted(events, key=lambda event: float(event["ts"])):
            by_row[int(event["pid"]), int(event["tid"])].append(event)
        steps = {row: _split_steps(mine) for row, mine in by_row.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _not_a_trace(path, f"an event has no {error}") from None
    stages = {stage for _, stage in by_row}
    if stages != set(range(plan.num_stages)):
        raise ConfigError(
            f"the trace {path} is not of this plan: it has {len(stages)} stages, the plan {plan.num_stages}",
            fix="name the trace of a run of this plan",
        )
    last = min(len(found) for found in steps.values()) - 1
    chosen = {row: found[last] for row, found in steps.items()}
    begin = min(bar.begin for bars in chosen.values() for bar in bars)
    shared = len(by_row) > len(stages)
    rows = [
        TimelineRow(
            stage,
            f"stage {stage}, rank {rank}" if shared else f"stage {stage}",
            tuple(TimelineBar(b.kind, b.microbatch, b.begin - begin, b.end - begin) for b in chosen[rank, stage]),
        )
        for rank, stage in sorted(chosen, key=lambda row: (row[1], row[0]))
    ]
    timeline = StepTimeline(tuple(rows))
    _check_microbatches(timeline, plan, path)
    return timeline


def _events(path: str | Path) -> list[dict[str, Any]]:
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the trace {path}: {error.strerror}", fix="name a file that `compiled.write_trace` wrote"
        ) from None
    except (ValueError, RecursionError):
        raise _not_a_trace(path, "it is not JSON") from None
    events = cast(dict[str, Any], data).get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in cast(list[Any], events)):
        raise _not_a_trace(path, "it has no list of traceEvents")
    return cast(list[dict[str, Any]], events)


def _split_steps(events: list[dict[str, Any]]) -> list[list[TimelineBar]]:
    """The events of a row, step by step: a step begins where a function runs that has run in the step before.

    What arrives between two functions belongs to the next one, what is sent to the one before.
    """
    steps: list[list[TimelineBar]] = [[]]
    seen, arrived = set[str](), list[TimelineBar]()
    for event in events:
        category, match = event["cat"], _LABEL.fullmatch(event["name"])
        assert match is not None  # it matches every text
        microbatch = None if match["microbatch"] is None else int(match["microbatch"])
        kind = _KIND_OF_CATEGORY.get(category) or _phase_of(match["name"])
        if kind not in (*COMPUTING, *TRANSFERRING):
            raise ValueError(f"a phase: {event['name']}")
        begin = float(event["ts"]) / 1e6
        bar = TimelineBar(kind, microbatch, begin, begin + float(event["dur"]) / 1e6)
        if category == "arrive":
            arrived.append(bar)
            continue
        if category == "run":
            if event["name"] in seen:
                steps.append([])
                seen.clear()
            seen.add(event["name"])
        steps[-1] += [*arrived, bar]
        arrived = []
    steps[-1] += arrived
    return steps


def _phase_of(function: str) -> str:
    """The phase of a stage function: ``update`` of ``stage0.update`` and of its next round, ``stage0.update_1``."""
    return re.sub(r"_\d+$", "", function.split(".")[1])


def _check_microbatches(timeline: StepTimeline, plan: Plan, path: str | Path) -> None:
    for row in timeline.rows:
        found = {bar.microbatch for bar in row.bars if bar.kind in COMPUTING} - {None}
        if found and len(found) != plan.num_microbatches:
            raise ConfigError(
                f"the trace {path} is not of this plan: {row.name} has {len(found)} microbatches, "
                f"the plan {plan.num_microbatches}",
                fix="name the trace of a run of this plan",
            )


def _not_a_trace(path: str | Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is not a trace of a run", why=why, fix="name a file that `compiled.write_trace` wrote")
