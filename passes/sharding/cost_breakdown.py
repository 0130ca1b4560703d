"""Predicted cost of chosen shardings: seconds, bytes sent by collective, and peak memory by class."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.ir.attributes import BACKWARD, FORWARD, ONCE_PER_STEP, PREPARE, UPDATE
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.baselines import Roles
from bactrian.passes.sharding.sharding_model import ShardingModel, Shardings, step_seconds
from bactrian.passes.sharding.work_from_ir import Reading

_OF_PHASE = {PREPARE: "prepared", FORWARD: "activations", BACKWARD: "gradients", UPDATE: "update"}


@dataclass(frozen=True)
class CostBreakdown:
    """The predicted cost of a step.

    Attributes:
        computing_seconds: the part of its time in which a device computes.
        communication_seconds: the part in which devices exchange values.
        memory: peak bytes of a device, by class; classes without bytes are left out.
    """

    computing_seconds: float
    communication_seconds: float
    memory: tuple[tuple[str, int], ...]


def cost_breakdown(
    model: ShardingModel, reading: Reading, roles: Sequence[str], choice: Sequence[int], shardings: Shardings
) -> CostBreakdown:
    """The breakdown of a choice of the model's network."""
    problem = model.problem
    computing = sum(
        op.runs_per_step * model.computing(op, strategy)
        for op, strategy in zip(problem.ops, shardings.chosen, strict=True)
        if strategy is not None
    )
    loading = sum(s / shardings.arguments[number].num_shards(model.mesh.sizes) for number, s in problem.loads)
    names = memory_classes(model, reading, roles)
    network = model.network
    held = [usage[k].item() for usage, k in zip(network.usages, choice, strict=True)]
    change = np.zeros(max(end for _, end in network.intervals) + 1)
    for (first, end), nbytes in zip(network.intervals, held, strict=True):
        change[first] += nbytes
        change[end] -= nbytes
    peak = int(np.cumsum(change).argmax())
    memory = dict[str, int]()
    for (first, end), nbytes, name in zip(network.intervals, held, names, strict=True):
        if first <= peak < end and nbytes:
            memory[name] = memory.get(name, 0) + round(nbytes)
    communication = max(0.0, shardings.seconds - computing - loading)
    return CostBreakdown(computing, communication, tuple(sorted(memory.items(), key=lambda x: -x[1])))


def phase_seconds(model: ShardingModel, reading: Reading, shardings: Shardings) -> dict[str, float]:
    """The seconds of a step in each phase, without what the values of other stages take to come here.

    Batches are loaded in the forward phase; what is initialized, or done for the results alone, counts as the update.
    """

    def phase_of(index: int) -> str:
        phase = flow.phases[index]
        return phase if phase in (PREPARE, FORWARD, BACKWARD) else UPDATE

    flow, taken = reading.flow, step_seconds(model, shardings)
    found: dict[str, float] = dict.fromkeys((PREPARE, FORWARD, BACKWARD, UPDATE), 0.0)
    found[FORWARD] += sum(taken.loads)
    for entry, seconds in zip(reading.ops, taken.ops, strict=True):
        found[phase_of(entry.index)] += seconds
    phase_of_carried = {reading.value_of[result]: phase_of(loop.end) for loop in flow.loops for result in loop.results}
    for (_, number, _), seconds in zip(reading.problem.loop_carried, taken.loops, strict=True):
        found[phase_of_carried[number]] += seconds
    found[UPDATE] += taken.updates
    return found


def bytes_sent(
    model: ShardingModel,
    reading: Reading,
    shardings: Shardings,
    num_microbatches: int,
    updates: Sequence[int | None],
    first: Collection[int],
) -> dict[str, int]:
    """What each device sends in a step, by kind of collective: as `Writer` counts it, without writing anything.

    Readers in one function share the reshards of a value, and in one loop its halos; values that are free send nothing.

    Args:
        model: its tables.
        reading: what was read.
        shardings: what was chosen.
        num_microbatches: how often forward and backward run in a step.
        updates: for each result of ``@main`` the argument that it is the next value of.
        first: the arguments that no stage before reads.
    """
    flow = reading.flow
    home, copied, total = dict(shardings.arguments), set[tuple[Hashable, ...]](), dict[str, float]()

    def count(kind: str, nbytes: float, weight: float) -> None:
        if nbytes:
            total[kind] = total.get(kind, 0.0) + weight * nbytes

    def read(number: int, spec: Spec, phase: str | None, narrowed: int | None = None) -> None:
        value = reading.value_of[number]
        source = home.get(value)
        if source is None:
            return
        weight = flow.value_iterations[number] * (1.0 if phase in (*ONCE_PER_STEP, None) else num_microbatches)
        for step in model.tables[value if narrowed is None else narrowed].path(source, spec):
            key = number, narrowed, reading.function_of(phase), step.target
            if key not in copied:
                copied.add(key)
                count(step.kind, step.nbytes, weight)

    for entry, strategy in zip(reading.ops, shardings.chosen, strict=True):
        if strategy is None:
            continue
        for number, spec in zip(entry.reads, strategy.operands, strict=True):
            read(number, spec, flow.phases[entry.index], entry.op.results[0] if entry.op.narrows else None)
        for exchange in reading.new_exchanges(entry, strategy, copied):
            count(exchange.kind, exchange.send.nbytes, entry.op.runs_per_step)
        for reduction in strategy.reductions:
            count(reduction.kind, reduction.nbytes, entry.op.runs_per_step)
        home.update(zip(entry.op.results, strategy.results, strict=True))
    for loop in flow.loops:
        for number, result in zip(loop.returned, loop.results, strict=True):
            if reading.value_of[result] in home:
                read(number, home[reading.value_of[result]], flow.phases[loop.end])
    made = {value for entry in reading.ops for value in entry.op.results}
    for number, updated in zip(flow.operands[-1], updates, strict=True):
        own = reading.value_of[number] in made or reading.value_of[number] in first
        if own and updated is not None and updated in shardings.arguments:
            read(number, shardings.arguments[updated], None)
    return {kind: round(nbytes) for kind, nbytes in sorted(total.items())}


def memory_classes(model: ShardingModel, reading: Reading, roles: Sequence[str]) -> list[str]:
    """What each node of the network holds."""
    who = Roles.of(reading, roles)
    of_input = {number: "constants" if role == "constant" else role for number, role in enumerate(roles)}
    of_input |= dict.fromkeys(who.parameters, "parameters") | dict.fromkeys(who.rest, "optimizer state")
    names = [of_input.get(number, "received") for number in model.problem.inputs]
    gradients = set(who.gradients)
    for position in model.nodes.ops:
        entry = reading.ops[position]
        phase = reading.flow.phases[entry.index]
        own = gradients.intersection(entry.op.results)
        names.append("gradients" if own else _OF_PHASE.get(phase or "", "other"))
    return names
