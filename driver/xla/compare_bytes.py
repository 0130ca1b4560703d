"""What the compiled functions of a plan send, beside what is predicted: every difference with a name.

Each op of a function gets a number, which XLA carries to what it makes of the op. So every collective of the compiled
function is paired with the one that Shardy makes explicit for the same op, and only what is left needs a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
from jaxlib.mlir import ir

from bactrian.driver.xla.compile_stage import JaxDevice, compile_function, function_texts
from bactrian.driver.xla.hlo_collectives import HloCollective, op_names, read_collectives
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.location import name_stack, user_location
from bactrian.passes.ir.regions import main_function, nested_operations
from bactrian.passes.sharding.collective_bytes import Collective, count_collectives
from bactrian.passes.spmd.halo import HALO

if TYPE_CHECKING:
    from bactrian.driver.planning.staged_plan import StagedPlan

UNEXPLAINED = "unexplained"
CLASSES: dict[str, str] = {
    "all-reduce-and-slice": "XLA adds up with an all-reduce and keeps a slice of it, where a reduce-scatter is planned",
    "axis-by-axis": "XLA does one collective over several axes as one along each",
    "shared": "XLA makes a copy once that is planned twice, for equal values and shardings",
    "dropped": "XLA has removed the op: nothing of the compiled function comes from it",
    "gather-and-reduce": "XLA gathers the partial results and reduces them on every device, for several results at once",
    HALO: "XLA exchanges other halos than are planned, for an op with windows",
    "element-type": "XLA sends the tensor with elements of another size",
    "gathered": "XLA gathers the tensor for a move that is planned to send less",
    "added": "the partitioner's own, for an op that finds its elements by index, or sorts: nothing is planned there",
    "in-loop": "the collective is in a loop or a branch, of which the compiled function does not say how often it runs",
    UNEXPLAINED: "no reason is known",
}
"""Names of differences, and what they mean."""

_WINDOWED = frozenset(
    f"stablehlo.{name}" for name in ("convolution", "reduce_window", "select_and_scatter", "pad", "slice")
)
_INDEXED = frozenset(
    f"stablehlo.{name}" for name in ("dynamic_slice", "dynamic_update_slice", "gather", "scatter", "sort")
)
_TOLERANCE = 1e-6
_NUMBER = re.compile(r"\bop\.(\d+)/")


@dataclass(frozen=True)
class Sent:
    """A collective, as it is planned or compiled.

    Attributes:
        kind: with Shardy's names; ``halo`` for a halo exchange.
        group: devices that take part together.
        nbytes: what each of them sends when the function runs once.
        element_bytes: of one element.
    """

    kind: str
    group: int
    nbytes: float
    element_bytes: float

    def equals(self, other: Sent) -> bool:
        """Whether the two send the same, in the same way."""
        return (self.kind, self.group) == (other.kind, other.group) and _close(self.nbytes, other.nbytes)


@dataclass(frozen=True)
class Difference:
    """An op for which the compiled function sends something else than is planned.

    Attributes:
        names: what explains it, of `CLASSES`.
        op: what op it is, and its name stack.
        where: the user's ``file:line``.
        planned, compiled: the collectives that are not the same.
    """

    names: tuple[str, ...]
    op: str
    where: str
    planned: tuple[Sent, ...]
    compiled: tuple[Sent, ...]

    @property
    def more_bytes(self) -> float:
        """What the compiled function sends beyond the plan, negative where it sends less."""
        return sum(sent.nbytes for sent in self.compiled) - sum(sent.nbytes for sent in self.planned)


@dataclass(frozen=True)
class FunctionComparison:
    """One stage function.

    Attributes:
        symbol: as ``stage0.forward``.
        runs: how often it runs in a step.
        planned, compiled: bytes that each device sends when it runs once, by kind.
        num_planned, num_compiled: collectives; XLA combines several all-reduces into one.
        differences: in order of the ops.
    """

    symbol: str
    runs: int
    planned: dict[str, float]
    compiled: dict[str, float]
    num_planned: int
    num_compiled: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """All stage functions of a plan that are on a mesh of several devices."""

    functions: tuple[FunctionComparison, ...]

    @property
    def planned(self) -> dict[str, float]:
        """Bytes that the devices of all stages, one of each, send in a step by kind, as planned."""
        return _sum((function.planned, function.runs) for function in self.functions)

    @property
    def compiled(self) -> dict[str, float]:
        """The same, as compiled."""
        return _sum((function.compiled, function.runs) for function in self.functions)

    @property
    def classes(self) -> dict[str, float]:
        """For each name of a difference that occurs, by how many bytes a step sends more because of it.

        A difference with several names counts for the first of them.
        """
        return _sum(
            ({difference.names[0]: difference.more_bytes}, function.runs)
            for function in self.functions
            for difference in function.differences
        )

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        """The differences without a reason."""
        return tuple(d for function in self.functions for d in function.differences if UNEXPLAINED in d.names)


def compare(staged: StagedPlan, devices: Sequence[JaxDevice] | None = None) -> Comparison:
    """Compile every stage function on a mesh, and compare what it sends with what is planned. Runs nothing.

    Args:
        staged: a planned program.
        devices: at least as many as the widest mesh has; each stage is compiled for the first of them. By default all
            that jax has.

    Raises:
        ConfigError: no stage has a mesh, or there are too few devices.
    """
    program = staged.program
    widest = max(program.num_devices(stage) for stage in range(program.num_stages))
    if widest == 1:
        raise ConfigError(
            "cannot compare what is sent with XLA: every stage has one device",
            fix="plan on a mesh, as in --mesh data=2,model=4",
        )
    devices = jax.devices() if devices is None else devices
    if len(devices) < widest:
        raise ConfigError(
            f"cannot compile for a mesh of {widest} devices: this process has {len(devices)}",
            why="XLA compiles for devices that are there",
            fix=f"XLA_FLAGS=--xla_force_host_platform_device_count={widest} gives virtual CPU devices, before jax starts",
        )
    explicit = function_texts(staged.module, None, numbered=True)
    found = list[FunctionComparison]()
    for symbol, text in function_texts(staged.module, devices[0].platform, numbered=True).items():
        stage, _, phase = symbol.removeprefix("stage").partition(".")
        count = program.num_devices(int(stage))
        if count > 1:
            hlo = compile_function(text, devices[:count]).hlo_modules()[0].to_string()
            runs = program.num_microbatches if phase.startswith(("forward", "backward")) else 1
            found.append(compare_function(symbol, runs, explicit[symbol], hlo))
    return Comparison(tuple(found))


def compare_function(symbol: str, runs: int, text: str, hlo: str) -> FunctionComparison:
    """Compare one function.

    Args:
        symbol, runs: of the function.
        text: its module with `sdy.reshard`, ops numbered.
        hlo: what XLA has made of the same function, as text.
    """
    with make_context():
        module = ir.Module.parse(text)
        planned = [collective for collective in count_collectives(module) if collective.nbytes]
        ops = {
            number: _Op(op.name, name_stack(op.location).partition("/")[2], user_location(op.location))
            for number, op in enumerate(nested_operations(main_function(module)))
        }
    windowed = {number for number, op in ops.items() if op.name in _WINDOWED}
    compiled = [_named(collective, windowed) for collective in read_collectives(hlo) if collective.nbytes]
    return FunctionComparison(
        symbol,
        runs,
        _sum(({c.kind: c.nbytes}, 1) for c in planned),
        _sum(({c.kind: c.total_bytes}, 1) for c in compiled),
        len(planned),
        len(compiled),
        _Pairing(planned, compiled, ops, hlo).differences(),
    )


def _named(collective: HloCollective, windowed: set[int]) -> HloCollective:
    """A permute that XLA makes of an op with windows exchanges borders."""
    numbers = {int(number) for number in _NUMBER.findall(collective.op_name)}
    if collective.kind != "collective_permute" or not numbers or not numbers <= windowed:
        return collective
    return replace(collective, kind=HALO)


@dataclass(frozen=True)
class _Op:
    name: str
    stack: str
    where: str


@dataclass
class _Group:
    """Ops that can only be compared together, for most one op."""

    numbers: tuple[int, ...]
    planned: list[Collective] = field(default_factory=list[Collective])
    compiled: list[Sent] = field(default_factory=list[Sent])
    in_loop: bool = False


class _Pairing:
    """Pairs the collectives of a function by the ops that they come from."""

    def __init__(
        self, planned: Sequence[Collective], compiled: Sequence[HloCollective], ops: dict[int, _Op], hlo: str
    ) -> None:
        self._ops = ops
        self._present = {int(number) for name in op_names(hlo) for number in _NUMBER.findall(name)}
        parts = [part for collective in compiled for part in _parts(collective)]
        self._groups = _grouped([_number(c.where) for c in planned], [numbers for numbers, _, _ in parts])
        for collective in planned:
            self._groups[_number(collective.where)].planned.append(collective)
        for numbers, sent, in_loop in parts:
            group = self._groups[numbers[0] if numbers else -1]
            group.compiled.append(sent)
            group.in_loop |= in_loop
        self._sent_twins = {c.twin for group in self._groups.values() if group.compiled for c in group.planned}

    def differences(self) -> tuple[Difference, ...]:
        """All of them, in order of the ops."""
        groups = {id(group): group for _, group in sorted(self._groups.items())}
        found = (self._difference(group) for group in groups.values())
        return tuple(difference for difference in found if difference is not None)

    def _difference(self, group: _Group) -> Difference | None:
        planned, compiled = list(group.planned), list(group.compiled)
        for one in group.planned:
            same = next((sent for sent in compiled if sent.equals(_sent(one))), None)
            if same is not None:
                planned.remove(one)
                compiled.remove(same)
        if _are_together([_sent(one) for one in planned], compiled):
            planned, compiled = [], []
        if not planned and not compiled and not group.in_loop:
            return None
        names = self._names(group, planned, compiled)
        ops = [self._ops[number] for number in group.numbers if number in self._ops]
        return Difference(
            names,
            ", ".join(f"{op.name} {op.stack}" for op in ops),
            ops[0].where if ops else "",
            tuple(_sent(one) for one in planned),
            tuple(compiled),
        )

    def _names(self, group: _Group, planned: Sequence[Collective], compiled: Sequence[Sent]) -> tuple[str, ...]:
        loop = ("in-loop",) if group.in_loop else ()
        if not planned and not compiled:
            return loop
        if not compiled:
            if all(one.twin in self._sent_twins for one in planned):
                return "shared", *loop
            if self._present.isdisjoint(group.numbers):
                return "dropped", *loop
            return UNEXPLAINED, *loop
        ops = {self._ops[number].name for number in group.numbers if number in self._ops}
        if any(sent.kind == HALO for sent in compiled):
            rest = [sent for sent in compiled if sent.kind != HALO]
            left = [sent for sent in planned if sent.kind != HALO]
            others = self._names(group, left, rest) if left or rest else ()
            return (UNEXPLAINED, *loop) if UNEXPLAINED in others else (HALO, *others)
        if not planned:
            return "added" if ops and ops <= _INDEXED else UNEXPLAINED, *loop
        names = _reduction_names([_sent(one) for one in planned], compiled)
        if not names and ops == {"stablehlo.reduce"}:
            names = _gathered_partials([_sent(one) for one in planned], compiled)
        if not names and ops == {"sdy.reshard"}:
            names = _move_names([_sent(one) for one in planned], compiled)
        return (*(names or (UNEXPLAINED,)), *loop)


def _are_together(planned: Sequence[Sent], compiled: Sequence[Sent]) -> bool:
    """Whether the reduce-scatters of several ops are one."""
    if len(compiled) != 1 or len(planned) < 2:
        return False
    kinds = {(sent.kind, sent.group, sent.element_bytes) for sent in (*planned, *compiled)}
    one_kind = len(kinds) == 1 and compiled[0].kind == "reduce_scatter"
    return one_kind and _close(sum(sent.nbytes for sent in planned), compiled[0].nbytes)


def _grouped(planned: Iterable[int], compiled: Iterable[tuple[int, ...]]) -> dict[int, _Group]:
    """A group for every op; one for all ops of a collective that can't be told apart."""
    members = {number: {number} for number in planned}
    for numbers in compiled:
        together = set[int]().union(*(members.get(number, {number}) for number in numbers or (-1,)))
        for number in together:
            members[number] = together
    groups = {tuple(sorted(together)): _Group(tuple(sorted(together))) for together in members.values()}
    return {number: groups[tuple(sorted(together))] for number, together in members.items()}


def _parts(collective: HloCollective) -> list[tuple[tuple[int, ...], Sent, bool]]:
    """What a compiled collective sends for which ops. One that XLA has combined names its ops in order of its results."""
    numbers = tuple(int(number) for number in _NUMBER.findall(collective.op_name))
    in_loop = collective.times is None
    times = collective.total_bytes / collective.nbytes
    total = sum(collective.result_bytes)
    sents = [
        Sent(collective.kind, collective.group, collective.nbytes * times * nbytes / total, element)
        for nbytes, element in zip(collective.result_bytes, collective.element_bytes, strict=True)
    ]
    if collective.kind == "all_to_all":  # a tuple of the pieces of one tensor
        sent = Sent(collective.kind, collective.group, collective.total_bytes, collective.element_bytes[0])
        return [(tuple(sorted(set(numbers))), sent, in_loop)]
    if len(numbers) == len(sents):
        return [((number,), sent, in_loop) for number, sent in zip(numbers, sents, strict=True)]
    return [(tuple(sorted(set(numbers))), sent, in_loop) for sent in sents]


def _reduction_names(planned: Sequence[Sent], compiled: Sequence[Sent]) -> tuple[str, ...]:
    """Names of a difference between two ways to reduce, or to gather, one tensor over the same devices; () for none."""
    kinds, made = {sent.kind for sent in planned}, {sent.kind for sent in compiled}
    sizes, sizes_made = {sent.element_bytes for sent in planned}, {sent.element_bytes for sent in compiled}
    if len(kinds) > 1 or len(made) > 1 or len(sizes) > 1 or len(sizes_made) > 1:
        return ()
    kind, to = kinds.pop(), made.pop()
    wider = sizes_made.pop() / sizes.pop()
    if kind == to == "all_reduce" and len(planned) == 1:
        whole = planned[0].nbytes * planned[0].group / (planned[0].group - 1) / 2
    elif kind == "reduce_scatter" and to == "all_reduce":
        group = math.prod(sent.group for sent in planned)
        whole = sum(sent.nbytes for sent in planned) * group / (group - 1)
    elif kind == to and kind in ("all_gather", "reduce_scatter"):
        whole = None
    else:
        return ()
    if math.prod(sent.group for sent in planned) != math.prod(sent.group for sent in compiled):
        return ()
    if whole is None:
        fits = _close(sum(s.nbytes for s in compiled), wider * sum(s.nbytes for s in planned))
    else:
        fits = all(_close(s.nbytes, 2 * (s.group - 1) / s.group * whole * wider) for s in compiled)
    names = (
        *(("all-reduce-and-slice",) if kind != to else ()),
        *(("element-type",) if wider != 1 else ()),
        *(("axis-by-axis",) if (len(compiled) != len(planned) and kind == to) or len(compiled) > 1 else ()),
    )
    return names if fits else ()


def _gathered_partials(planned: Sequence[Sent], compiled: Sequence[Sent]) -> tuple[str, ...]:
    """The name of a difference between reductions and gathers of the same partial results."""
    if any(sent.kind not in ("all_reduce", "reduce_scatter") for sent in planned):
        return ()
    halves = {"all_reduce": 2, "reduce_scatter": 1}
    gathers = sorted(sent.nbytes / halves[sent.kind] * sent.group for sent in planned)
    fits = len(gathers) == len(compiled) and all(map(_close, gathers, sorted(sent.nbytes for sent in compiled)))
    return ("gather-and-reduce",) if fits and all(sent.kind == "all_gather" for sent in compiled) else ()


def _move_names(planned: Sequence[Sent], compiled: Sequence[Sent]) -> tuple[str, ...]:
    """Names of a difference between one move and what was made of it; () for none."""
    if len(planned) != 1 or planned[0].kind not in ("all_to_all", "collective_permute"):
        return ()
    move = planned[0]
    held = move.nbytes if move.kind == "collective_permute" else move.nbytes * move.group / (move.group - 1)
    wider = compiled[0].element_bytes / move.element_bytes
    size = ("element-type",) if wider != 1 else ()
    if len(compiled) == 1 and compiled[0].kind == move.kind:
        return size if _close(compiled[0].nbytes, wider * move.nbytes) else ()
    whole = (math.prod(sent.group for sent in compiled) - 1) * held * wider
    gathers = all(sent.kind == "all_gather" for sent in compiled)
    return ("gathered", *size) if gathers and _close(sum(sent.nbytes for sent in compiled), whole) else ()


def _number(where: str) -> int:
    match = _NUMBER.search(where)
    return int(match[1]) if match else -1


def _sent(collective: Collective) -> Sent:
    return Sent(collective.kind, collective.group, collective.nbytes, float(collective.element_bytes))


def _close(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=_TOLERANCE)


def _sum(parts: Iterable[tuple[dict[str, float], int]]) -> dict[str, float]:
    total = dict[str, float]()
    for part, times in parts:
        for name, nbytes in part.items():
            total[name] = total.get(name, 0.0) + times * nbytes
    return dict(sorted(total.items()))
