"""The step unrolled: which task reads and writes which buffer for which microbatch, and one global order of all tasks.

The instructions of ranks, the estimate of memory and simulations all read it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import NamedTuple

from bactrian.passes.frame.errors import PassError
from bactrian.passes.pipelining.pipeline_events import ONCE, Task
from bactrian.passes.schedules.schedule import parse_token
from bactrian.runtime.staged_program import ONCE_PER_STEP, Call, StagedProgram

INDEX = -1  # value id of a microbatch's number

_PHASES = {"F": ("forward",), "B": ("backward",), "FB": ("forward", "backward", "forward_backward")}


class Key(NamedTuple):
    """One buffer: a value of one microbatch (or of the whole step) on one stage. ``copy`` > 0: a result's own copy."""

    value: int
    microbatch: int
    stage: int
    copy: int = 0


@dataclass
class UnrolledStep:
    """Reads and writes of every task of a step.

    Attributes:
        root: of every value, the value it was transferred from; itself if it was not.
        arguments: values that are there before the step.
        batches: values that are loaded, and the argument each is of.
        reads: the buffers that a task reads, in the order of its call's inputs.
        writes: the buffers that it makes, in the order of its call's outputs.
        producer: the task that makes a buffer.
        stage_tasks: every stage's tasks in its order.
        carried: values that are carried to the next microbatch.
    """

    program: StagedProgram
    root: dict[int, int] = field(default_factory=lambda: {})
    arguments: set[int] = field(default_factory=lambda: set())
    batches: dict[int, int] = field(default_factory=lambda: {})
    reads: dict[Task, tuple[Key, ...]] = field(default_factory=lambda: {})
    writes: dict[Task, tuple[Key, ...]] = field(default_factory=lambda: {})
    producer: dict[Key, Task] = field(default_factory=lambda: {})
    stage_tasks: list[list[Task]] = field(default_factory=lambda: [])
    carried: set[int] = field(default_factory=lambda: set())

    def __post_init__(self) -> None:
        program = self.program
        sources = {t.target: t.source for t in program.transfers}
        for value in range(len(program.values)):
            origin = value
            while origin in sources:
                origin = sources[origin]
            self.root[value] = origin
        for piece in program.arguments:
            if piece.role == "batch":
                self.batches[piece.value] = piece.argument
            else:
                self.arguments.add(piece.value)
        for call in program.calls:
            self.carried |= {call.outputs[o] for _, o in call.carries}
        self.stage_tasks = [stage_tasks(program, stage) for stage in range(program.num_stages)]
        for tasks in self.stage_tasks:
            for task in tasks:
                self._connect(task)
        self._check()

    def key(self, value: int, microbatch: int) -> Key:
        """The buffer that a reader in ``microbatch`` (or `ONCE`) finds the value in."""
        program = self.program
        if not program.values[self.root[value]].per_microbatch:
            microbatch = ONCE
        elif microbatch == ONCE or not program.values[value].per_microbatch:
            microbatch = program.num_microbatches - 1
        return Key(value, microbatch, program.values[value].stage)

    def origin(self, key: Key) -> Key:
        """The buffer that a transferred one is made from; itself if it is not transferred."""
        root = self.root[key.value] if key.value != INDEX else INDEX
        return key if root == key.value else Key(root, key.microbatch, self.program.values[root].stage)

    def call(self, task: Task) -> Call:
        """The call of a task."""
        return self.program.calls[task.call]

    def _connect(self, task: Task) -> None:
        call, microbatch = self.call(task), task.microbatch
        carried_from = dict(call.carries) if microbatch > 0 else {}
        reads: list[Key] = []
        for position, value in enumerate(call.inputs):
            if position == call.index_input:
                reads.append(Key(INDEX, microbatch, call.stage))
            elif position in carried_from:
                reads.append(self.key(call.outputs[carried_from[position]], microbatch - 1))
            else:
                reads.append(self.key(value, microbatch))
        self.reads[task] = tuple(reads)
        self.writes[task] = tuple(
            Key(v, microbatch if self.program.values[v].per_microbatch else ONCE, call.stage) for v in call.outputs
        )
        for key in self.writes[task]:
            if key in self.producer:
                raise PassError(f"value {key.value} of microbatch {key.microbatch} is made twice", where=call.function)
            self.producer[key] = task

    def _check(self) -> None:
        """Every call runs for every microbatch, and everything read exists, on the reader's stage."""
        program = self.program
        for i, call in enumerate(program.calls):
            wanted = [ONCE] if call.runs_once else range(program.num_microbatches)
            for microbatch in wanted:
                if Task(i, microbatch) not in self.reads:
                    raise PassError(
                        f"stage {call.stage} never runs {call.function} for microbatch {microbatch}",
                        why=f"its order is {' '.join(program.order[call.stage])}",
                    )
        for task, keys in self.reads.items():
            for key in keys:
                if key.value == INDEX:
                    continue
                if key.stage != self.call(task).stage:
                    raise PassError(
                        f"{self.call(task).function} reads value {key.value} of stage {key.stage}",
                        fix="transfer it first",
                    )
                self.check_origin(key, self.call(task).function)

    def check_origin(self, key: Key, reader: str) -> None:
        """Refuse a key that nothing makes."""
        origin = self.origin(key)
        if origin.value in self.batches and origin.value != key.value:
            raise PassError(f"{reader} reads a transferred batch piece", fix="give the stage its own batch piece")
        if origin not in self.producer and origin.value not in self.arguments and origin.value not in self.batches:
            raise PassError(f"{reader} reads value {key.value} of microbatch {key.microbatch}, which nothing makes")


def stage_tasks(program: StagedProgram, stage: int) -> list[Task]:
    """A stage's tasks in its order: preparation, the tokens, initialization before its first reader, the update rounds."""
    calls = {
        kind: [i for i, call in enumerate(program.calls) if call.stage == stage and call.phase in phases]
        for kind, phases in (*_PHASES.items(), *((phase, (phase,)) for phase in ONCE_PER_STEP))
    }
    first = calls["initialize"]
    made = {value for i in first for value in program.calls[i].outputs}
    tasks = [Task(i, ONCE) for i in calls["prepare"]]
    for token in program.order[stage]:
        kind, microbatch = parse_token(token)
        if first and any(made.intersection(program.calls[i].inputs) for i in calls[kind]):
            tasks += [Task(i, ONCE) for i in first]
            first = []
        tasks += [Task(i, microbatch) for i in calls[kind]]
    tasks += [Task(i, ONCE) for i in first]
    return tasks + [Task(i, ONCE) for i in sorted(calls["update"], key=lambda i: program.calls[i].round)]


def relative_cost(call: Call) -> float:
    """How long a call takes, in forwards: the backward has twice the flops; what is done once per step counts as one."""
    return {"forward": 1.0, "backward": 2.0, "forward_backward": 3.0}.get(call.phase, 1.0)


def simulate(step: UnrolledStep, stage_ranks: tuple[int, ...], cost: Callable[[Call], float]) -> dict[Task, float]:
    """When each task ends, all tasks of all ranks in one valid order. Transfers take no time.

    Of the tasks that could start, the earliest goes first; then backward before forward (it frees memory), the lower
    microbatch, the lower stage. That this ends with nothing left proves that the order of work is possible.

    Args:
        stage_ranks: the rank of each stage; a rank does one task at a time.
        cost: how long a call takes, in any unit.

    Raises:
        PassError: the stages' orders of work wait for each other.
    """
    dependencies = {
        task: {step.producer[o] for o in map(step.origin, keys) if o in step.producer}
        for task, keys in step.reads.items()
    }
    rank_free: dict[int, float] = defaultdict(float)
    end: dict[Task, float] = {}
    next_index = [0] * len(step.stage_tasks)
    heads: dict[int, tuple[Task, float]] = {}  # stage -> its next task, once all inputs are under way
    total = sum(map(len, step.stage_tasks))
    while len(end) < total:
        for stage, tasks in enumerate(step.stage_tasks):
            if stage in heads or next_index[stage] == len(tasks):
                continue
            task = tasks[next_index[stage]]
            if all(d in end for d in dependencies[task]):
                heads[stage] = task, max((end[d] for d in dependencies[task]), default=0.0)
        if not heads:
            raise _stuck(step, next_index, dependencies, end)
        _, _, _, stage = min(
            (max(ready, rank_free[stage_ranks[s]]), "backward" not in step.call(task).phase, task.microbatch, s)
            for s, (task, ready) in heads.items()
        )
        task, ready = heads.pop(stage)
        rank = stage_ranks[stage]
        rank_free[rank] = end[task] = max(ready, rank_free[rank]) + cost(step.call(task))
        next_index[stage] += 1
    return end


def _stuck(
    step: UnrolledStep, next_index: list[int], dependencies: dict[Task, set[Task]], done: Container[Task]
) -> PassError:
    waiting: list[str] = []
    for stage, tasks in enumerate(step.stage_tasks):
        if next_index[stage] < len(tasks):
            task = tasks[next_index[stage]]
            missing = min(d for d in dependencies[task] if d not in done)
            waiting.append(
                f"stage {stage}: {step.call(task).function} of microbatch {task.microbatch} waits for "
                f"{step.call(missing).function} of microbatch {missing.microbatch}"
            )
    return PassError("the order of work of the stages can't be carried out", why="; ".join(waiting))
