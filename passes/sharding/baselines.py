"""Baseline plans (data, ZeRO, Megatron): the shardings that they pin arguments to; the solver chooses the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import BACKWARD, FORWARD, UPDATE
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.work_from_ir import Reading
from bactrian.passes.spmd.sharding_rules import Dims

AUTO = "auto"
BASELINES = ("data", "zero1", "zero2", "zero3", "megatron")


def check_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: it has another name.
    """
    if name != AUTO and name not in BASELINES:
        raise ConfigError(f"unknown strategy {name!r}", fix=f"use {AUTO}, or one of {', '.join(BASELINES)}")


_Dim = tuple[int, int]  # value, dim


@dataclass(frozen=True)
class Roles:
    """What the arguments of a step are for.

    Attributes:
        batch: sharded along dim 0.
        parameters: state that forward or backward read.
        rest: state that only the update reads.
        gradients: values that backward makes, or adds up, and the update reads.
    """

    batch: tuple[int, ...]
    parameters: tuple[int, ...]
    rest: tuple[int, ...]
    gradients: tuple[int, ...]

    @classmethod
    def of(cls, reading: Reading, roles: Sequence[str]) -> Roles:
        """From ``bactrian.role`` of the arguments and the phases of the ops."""
        flow, value_of = reading.flow, reading.value_of
        early, late = set[int](), set[int]()
        made = dict[int, str | None]()
        for index, (reads, phase) in enumerate(zip(flow.operands, flow.phases, strict=True)):
            (late if phase == UPDATE else early if phase is not None else set[int]()).update(value_of[v] for v in reads)
            for value in flow.results[index]:
                made[value] = phase
        state = [number for number, role in enumerate(roles) if role == "state"]
        gradients = sorted(v for v in late if made.get(v) in (FORWARD, BACKWARD) and reading.problem.values[v].shape)
        return cls(
            batch=tuple(number for number, role in enumerate(roles) if role == "batch"),
            parameters=tuple(number for number in state if number in early),
            rest=tuple(number for number in state if number not in early),
            gradients=tuple(gradients),
        )


def pin_baseline(reading: Reading, mesh: Mesh, roles: Sequence[str], name: str) -> Reading:
    """A program whose arguments are pinned to the shardings of a baseline; those that users specify stay.

    * ``data``: batches are sharded over all axes, state is replicated.
    * ``zero1``: as ``data``, with state that only the update reads sharded over all axes, along its largest dim that
      divides.
    * ``zero2``: gradients too. ``zero3``: parameters too. (Rajbhandari et al., SC 2020.)
    * ``megatron``: batches are sharded over all axes but the last; over the last, each parameter along one dim, chosen
      so that products come in pairs, by columns and by rows (Shoeybi et al., 2019): dims that belong together are
      sharded together, those with few parameters first, none of a batch's, none twice in a parameter.
    """
    who = Roles.of(reading, roles)
    problem, fixed = reading.problem, dict(reading.problem.pinned)
    everything = mesh.wide
    data = everything[:-1] if name == "megatron" else everything
    specs = {number: Spec.replicated(len(problem.values[number].shape)) for number in (*who.parameters, *who.rest)}
    for number in who.batch:
        shape = problem.values[number].shape
        divides = bool(shape) and shape[0] % mesh.group_size(data) == 0
        whole = Spec.replicated(len(shape))
        specs[number] = whole.with_dim(0, data) if divides else whole
    wanted = dict[int, Spec]()
    if name in ("zero1", "zero2", "zero3"):
        for number in who.rest + (who.parameters if name == "zero3" else ()):
            specs[number] = _spread(problem.values[number].shape, everything, mesh)
    if name in ("zero2", "zero3"):
        wanted = {value: _spread(problem.values[value].shape, everything, mesh) for value in who.gradients}
    if name == "megatron" and everything:
        specs |= _by_columns_and_rows(reading, who, everything[-1], mesh)
    specs |= fixed
    changed = replace(problem, pinned=tuple(sorted(specs.items())), preferred=tuple(sorted(wanted.items())))
    return replace(reading, problem=changed)


def _spread(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> Spec:
    """All axes over the largest dim that they divide; as many as divide one, where all divide none."""
    for count in range(len(axes), 0, -1):
        dims = [dim for dim, size in enumerate(shape) if size % mesh.group_size(axes[-count:]) == 0]
        if dims:
            best = max(dims, key=lambda dim: (shape[dim], -dim))
            return Spec.replicated(len(shape)).with_dim(best, axes[-count:])
    return Spec.replicated(len(shape))


def _by_columns_and_rows(reading: Reading, who: Roles, axis: str, mesh: Mesh) -> dict[int, Spec]:
    values = reading.problem.values
    groups = _Groups(reading)
    state = [number for number in (*who.parameters, *who.rest) if values[number].shape]
    taken_by_batch = {groups.of(number, dim) for number in who.batch for dim in range(len(values[number].shape))}
    dims_of = {number: [groups.of(number, dim) for dim in range(len(values[number].shape))] for number in state}
    members = dict[_Dim, list[tuple[int, int]]]()
    for number, dims in dims_of.items():
        for dim, group in enumerate(dims):
            members.setdefault(group, []).append((number, dim))
    uses: Counter[_Dim] = Counter()
    for number in who.parameters:
        uses.update(set(dims_of.get(number, ())))
    chosen, used = set[_Dim](), set[int]()
    for group in sorted(uses, key=lambda group: (uses[group], group)):
        numbers = [number for number, _ in members[group]]
        divides = all(values[number].shape[dim] % mesh.sizes[axis] == 0 for number, dim in members[group])
        matrices = any(len(values[number].shape) > 1 for number in numbers)
        twice = len(set(numbers)) < len(numbers) or not used.isdisjoint(numbers)
        if divides and matrices and not twice and group not in taken_by_batch:
            chosen.add(group)
            used.update(numbers)
    return {
        number: Spec(tuple((axis,) if group in chosen else () for group in dims)) for number, dims in dims_of.items()
    }


class _Groups:
    """Dims that belong together: those with the same major factor in the rule of some op."""

    def __init__(self, reading: Reading) -> None:
        self._parent = dict[_Dim, _Dim]()
        self._value_of = reading.value_of
        for entry, operation in zip(reading.ops, reading.problem.ops, strict=True):
            first = dict[int, _Dim]()
            for value, dims in zip(operation.operands, entry.rule.operands, strict=False):
                self._join(first, value, dims)
            for value, dims in zip(operation.results, entry.rule.results, strict=True):
                self._join(first, value, dims)
        for value, other, _ in reading.problem.loop_carried:
            for dim in range(len(reading.problem.values[value].shape)):
                self._join({dim: self.of(other, dim)}, value, ((),) * dim + ((dim,),))

    def of(self, value: int, dim: int) -> _Dim:
        """The group of a dim."""
        here = value, dim
        while (above := self._parent.get(here, here)) != here:
            self._parent[here] = self._parent.get(above, above)
            here = above
        return here

    def _join(self, first: dict[int, _Dim], value: int, dims: Dims) -> None:
        for dim, factors in enumerate(dims):
            if factors:
                mine = self.of(value, dim)
                other = self.of(*first.setdefault(factors[0], mine))
                if mine != other:
                    self._parent[max(mine, other)] = min(mine, other)
