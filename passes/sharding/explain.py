"""Why a value has its sharding: the alternatives, what a step takes with each, and what bound the choice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.views import Viewable
from bactrian.passes.machine.spec import Spec
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.solver import Solution, solve
from bactrian.passes.sharding.baselines import AUTO, pin_baseline
from bactrian.passes.sharding.cost_breakdown import bytes_sent, cost_breakdown
from bactrian.passes.sharding.reduce_scatter_choice import prefer_reduce_scatters
from bactrian.passes.sharding.sharding_model import ShardingModel, ShardingProblem
from bactrian.passes.sharding.stage_programs import StageProgram
from bactrian.passes.sharding.unshardable_dims import UnshardableDim, unshardable_dims
from bactrian.passes.sharding.value_names import NamedValue, place_text
from bactrian.passes.sharding.work_from_ir import Reading

_EQUAL = 1e-9  # of seconds: what differs by less is equal
_COUNTED = "the stages, each of which counts for itself"
_PATIENCE = 2.0  # a sharding gets at least so many times what the choice itself took, while there is time


@dataclass(frozen=True)
class Alternative:
    """One sharding of the value, with the best of everything else.

    Attributes:
        sharding: the axes of each dim, ``-`` for a replicated one.
        is_chosen: whether it is the plan's.
        seconds: of a step, the least that was found; None where none was, or it does not fit.
        bound_seconds: no step with this sharding takes less; None where it does not fit, or nothing is known.
        communication_seconds: the part of ``seconds`` in which devices exchange values.
        memory_bytes: the peak of a device; of a sharding that does not fit, the least that it takes.
        memory: the same by class, where there are seconds.
        sent_bytes: what each device sends in a step, by kind of collective.
        lacking_bytes: what a device's memory is short of; 0 where the sharding fits.
    """

    sharding: str
    is_chosen: bool = False
    seconds: float | None = None
    bound_seconds: float | None = None
    communication_seconds: float | None = None
    memory_bytes: int | None = None
    memory: tuple[tuple[str, int], ...] = ()
    sent_bytes: tuple[tuple[str, int], ...] = ()
    lacking_bytes: int = 0

    @property
    def is_proved(self) -> bool:
        """Whether ``seconds`` are the least."""
        return None not in (self.seconds, self.bound_seconds) and _at_least(self.bound_seconds, self.seconds)


@dataclass(frozen=True)
class Unlimited:
    """What would be chosen if memory did not matter, where that is faster.

    Attributes:
        sharding: of the value.
        seconds: of a step.
        memory_bytes: the peak of a device.
        binds: whether the value's sharding is another one for want of memory: with the plan's sharding, and without a
            limit, a step takes longer.
    """

    sharding: str
    seconds: float
    memory_bytes: int
    binds: bool


@dataclass(frozen=True)
class Explanation(Viewable):
    """All that is said of one value.

    Attributes:
        name, origin, type: as in `NamedValue`.
        place: the user's ``file:line``, or "".
        nbytes: of the whole value.
        stage: that it belongs to; None where there is one stage.
        mesh: names and sizes of the axes.
        sharding: the plan's; "" of a scalar.
        local_shape, local_bytes: of a device's shard.
        reason: ``given``, ``memory``, ``cheapest``, ``only`` (there is one sharding), ``free`` (any sharding costs
            nothing), or ``unproved`` (a better one was found here).
        given_by: who gave the sharding, or "".
        seconds, bound_seconds: of a step as planned, and the least that it could take.
        limit_bytes: memory of a device.
        unlimited: if memory keeps the step from being faster.
        alternatives: the fastest first; those that were not finished, and those that do not fit, at the end.
        impossible: dims that can't be sharded.
        notes: what else ties the sharding to others.
    """

    name: str
    origin: str
    type: str
    place: str
    nbytes: int
    stage: int | None
    mesh: tuple[tuple[str, int], ...]
    sharding: str
    local_shape: tuple[int, ...]
    local_bytes: int
    reason: str
    given_by: str
    seconds: float
    bound_seconds: float
    limit_bytes: int
    unlimited: Unlimited | None
    alternatives: tuple[Alternative, ...]
    impossible: tuple[UnshardableDim, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        fields = asdict(self)
        fields["mesh"] = dict(self.mesh)
        for each, entry in zip(self.alternatives, fields["alternatives"], strict=True):
            entry |= {"memory": dict(each.memory), "sent_bytes": dict(each.sent_bytes), "is_proved": each.is_proved}
        return fields


class StageExplainer:
    """Answers about the values of one stage.

    Args:
        program: of the stage.
        values: their names.
        strategy: ``auto``, or a baseline.
        roles: of the arguments.
        updates: for each result of ``@main`` the argument that it is the next value of.
        limit: bytes of a device.
        given: who gave arguments their shardings, by number.
        first: the arguments that no stage before reads.
        time_limit: seconds for the plan's own choice.
    """

    def __init__(
        self,
        program: StageProgram,
        values: Sequence[NamedValue],
        strategy: str,
        roles: Sequence[str],
        updates: Sequence[int | None],
        limit: int,
        given: Mapping[int, str],
        first: frozenset[int],
        time_limit: float,
    ) -> None:
        self.program, self.strategy, self.roles, self.updates = program, strategy, roles, updates
        self._named = {value.number: value for value in values if value.stage == program.stage}
        self.limit, self.given, self.first, self.time_limit = limit, given, first, time_limit
        self.reading = program.reading
        if strategy != AUTO:
            self.reading = pin_baseline(program.reading, program.mesh, roles, strategy)
        self.model = ShardingModel(self.reading.problem, program.mesh, limit)

    @cached_property
    def solution(self) -> Solution:
        """The plan's choice, made once more."""
        return prefer_reduce_scatters(self.model, solve(self.model.network, self.time_limit))

    def sharding(self, value: int) -> str:
        """The plan's sharding of a value; ``any`` where it costs nothing."""
        found = self.model.specs_of(value)
        return "any" if found is None else str(found[1][self.solution.choice[found[0]]])

    def explain(self, value: NamedValue, deadline: float) -> Explanation:
        """All about one value.

        Args:
            value: that the stage holds.
            deadline: of `time.monotonic`; what is not finished then is said to be so.
        """
        problem, mesh = self.model.problem, self.program.mesh
        tensor = problem.values[value.number]
        found = self.model.specs_of(value.number)
        solution, model = self.solution, self.model
        spec: Spec | None = None
        given_by, unlimited, alternatives = "", None, list[Alternative]()
        if found is not None:
            node, specs = found
            spec = specs[solution.choice[node]]
            given_by = self._given_by(value, spec)
            if not given_by:
                unlimited = self._unlimited(value.number, spec, deadline)
            if given_by and given_by != _COUNTED:
                open_ = replace(self.reading, problem=_without_given(problem, value.number))
                model = ShardingModel(open_.problem, mesh, self.limit)
                alternatives = self._alternatives(value.number, spec, model, open_, deadline)
            else:
                alternatives = self._alternatives(value.number, spec, model, self.reading, deadline)
        held = Spec.replicated(len(tensor.shape)) if spec is None else spec
        return Explanation(
            name=value.label,
            origin=value.origin,
            type=value.type,
            place="" if value.place is None else place_text(value.place),
            nbytes=tensor.nbytes,
            stage=self.program.only,
            mesh=tuple((axis.name, axis.size) for axis in mesh.axes),
            sharding="any" if spec is None else str(spec),
            local_shape=held.local_shape(tensor.shape, mesh.sizes),
            local_bytes=round(tensor.nbytes / held.num_shards(mesh.sizes)),
            reason=_reason(spec, given_by, alternatives, unlimited),
            given_by=given_by,
            seconds=float(solution.cost),
            bound_seconds=float(solution.lower_bound),
            limit_bytes=self.limit,
            unlimited=unlimited,
            alternatives=tuple(sorted(alternatives, key=_order)),
            impossible=() if spec is None else tuple(unshardable_dims(model, value.number, value.op)),
            notes=tuple(self._notes(value.number)),
        )

    def _given_by(self, value: NamedValue, spec: Spec) -> str:
        """Who decided the sharding, or ""."""
        number = value.number
        if number in self.given:
            return self.given[number]
        if number in dict(self.program.reading.problem.pinned):
            return _COUNTED if number < self.reading.flow.num_arguments else self._constraint(number)
        problem = self.reading.problem
        if dict(problem.pinned).get(number) == spec or dict(problem.preferred).get(number) == spec:
            return f"strategy {self.strategy}" if self.strategy != AUTO else _COUNTED
        if any(op.constraint_specs and number in op.results for op in problem.ops):
            return self._constraint(number)
        return ""

    def _constraint(self, value: int) -> str:
        place = self._named[value].place
        return "a sharding constraint" + ("" if place is None else f" at {place_text(place)}")

    def _alternatives(
        self, value: int, chosen: Spec, model: ShardingModel, reading: Reading, deadline: float
    ) -> list[Alternative]:
        """The chosen sharding as it is planned, and all others of a model: of one that leaves the value open, if its
        sharding was given."""
        solution = self.solution
        rows = [self._solved(chosen, value, self.model, self.reading, solution, is_chosen=True)]
        found = model.specs_of(value)
        assert found is not None  # it has shardings already
        node, specs = found
        others = [spec for spec in dict.fromkeys(specs) if spec != chosen]
        for number, spec in enumerate(others):
            kept = [k for k, each in enumerate(specs) if each == spec]
            network = model.network.restricted(node, kept)
            least = network.least_peak()
            if least > self.limit:  # whatever the edges forbid
                lacking = round(least) - self.limit
                rows.append(Alternative(str(spec), memory_bytes=round(least), lacking_bytes=lacking))
                continue
            left = max(0.0, deadline - time.monotonic())
            share = max(left / (len(others) - number), min(left, _PATIENCE * solution.seconds))
            answer = _answer(network, share)
            if answer is None:
                bound = float(solution.lower_bound) if model is self.model else None
                rows.append(Alternative(str(spec), bound_seconds=bound))
                continue
            choice = list(answer.choice)
            choice[node] = kept[choice[node]]
            rows.append(self._solved(spec, value, model, reading, replace(answer, choice=tuple(choice))))
        return rows

    def _solved(
        self,
        spec: Spec,
        value: int,
        model: ShardingModel,
        reading: Reading,
        solution: Solution,
        *,
        is_chosen: bool = False,
    ) -> Alternative:
        shardings = model.shardings(solution.choice)
        taken = cost_breakdown(model, reading, self.roles, solution.choice, shardings)
        moved = bytes_sent(model, reading, shardings, self.program.num_microbatches, self.updates, self.first)
        return Alternative(
            sharding=str(spec),
            is_chosen=is_chosen,
            seconds=float(solution.cost),
            bound_seconds=float(solution.lower_bound),
            communication_seconds=taken.communication_seconds,
            memory_bytes=round(solution.memory),
            memory=taken.memory,
            sent_bytes=tuple(moved.items()),
        )

    def _unlimited(self, value: int, chosen: Spec, deadline: float) -> Unlimited | None:
        """The choice without a memory limit, if it is faster."""
        network = self.model.network
        if network.peak([int(usages.argmax()) for usages in network.usages]) <= self.limit:
            return None
        free = replace(network, limit=None)
        best = _answer(free, max(0.0, deadline - time.monotonic()) / 2)
        if best is None or _at_least(float(best.cost), float(self.solution.cost)):
            return None
        found = self.model.specs_of(value)
        assert found is not None
        node, specs = found
        spec, binds = specs[best.choice[node]], False
        if spec != chosen:
            kept = [k for k, each in enumerate(specs) if each == chosen]
            forced = _answer(free.restricted(node, kept), max(0.0, deadline - time.monotonic()) / 2)
            binds = forced is not None and forced.lower_bound > float(best.cost) * (1 + _EQUAL)
        return Unlimited(str(spec), float(best.cost), round(best.memory), binds)

    def _notes(self, value: int) -> list[str]:
        """What else ties the sharding: constraints that read the value, halo exchanges, the state that it becomes."""
        names = self._halos(value)
        for op in self.reading.problem.ops:
            if op.constraint_specs and value in op.operands:
                asked = " or ".join(map(str, op.constraint_specs))
                names.append(f"{self._constraint(op.results[0])} reads it as {asked}")
        for made, argument in self.reading.problem.updates:
            if made == value:
                path = self._named[argument].name
                names.append(f"it is the next value of {path}, which is {self.sharding(argument) or 'a scalar'}")
        return names

    def _halos(self, value: int) -> list[str]:
        """The halo exchanges of the value, for ops with windows."""
        problem, names = self.model.problem, list[str]()
        chosen = self.model.shardings(self.solution.choice).chosen
        for op, strategy in zip(problem.ops, chosen, strict=True):
            exchanges = strategy.exchanges if strategy is not None else ()
            own = [each for each in exchanges if op.operands[each.send.operand] == value]
            if own:
                rows = " and ".join(f"{e.send.rows} of dim {e.send.dim} ({'+'.join(e.axes)})" for e in own)
                nbytes, seconds = sum(each.send.nbytes for each in own), sum(each.seconds for each in own)
                names.append(
                    f"{self._named[op.results[0]].label} exchanges a halo, rows: {rows}; "
                    f"{nbytes:,.0f} bytes, {seconds:.3g} s"
                )
        return names


def _reason(spec: Spec | None, given_by: str, alternatives: Sequence[Alternative], unlimited: Unlimited | None) -> str:
    if spec is None:
        return "free"
    if given_by:
        return "given"
    if len(alternatives) == 1:
        return "only"
    chosen = next(row.seconds for row in alternatives if row.is_chosen)
    if any(row.seconds is not None and not _at_least(row.seconds, chosen) for row in alternatives):
        return "unproved"
    return "memory" if unlimited is not None and unlimited.binds else "cheapest"


def _at_least(seconds: float | None, other: float | None) -> bool:
    return seconds is not None and other is not None and seconds >= other * (1 - _EQUAL)


def _order(row: Alternative) -> tuple[int, float, bool, str]:
    """The fastest first, the plan's before equal ones; then what was not finished, then what does not fit."""
    if row.seconds is not None:
        return 0, float(f"{row.seconds:.9e}"), not row.is_chosen, row.sharding
    if row.lacking_bytes:
        return 2, row.lacking_bytes, True, row.sharding
    return 1, row.bound_seconds or 0.0, True, row.sharding


def _answer(network: CostNetwork, time_limit: float) -> Solution | None:
    """The best choice, None where none was found in time."""
    if time_limit <= 0:
        return None
    try:
        return solve(network, time_limit)
    except ConfigError:
        return None


def _without_given(problem: ShardingProblem, value: int) -> ShardingProblem:
    """The work as if nobody had decided the sharding of a value."""
    operations = tuple(
        replace(op, constraint_specs=()) if op.constraint_specs and value in op.results else op for op in problem.ops
    )
    fixed = tuple(pair for pair in problem.pinned if pair[0] != value)
    wanted = tuple(pair for pair in problem.preferred if pair[0] != value)
    return replace(problem, ops=operations, pinned=fixed, preferred=wanted)
