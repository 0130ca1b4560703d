"""Where forward ops are cut into layers: by weight, bytes that cross, stage boundaries and pinned arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.ir.attributes import BACKWARD, FORWARD
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.ir.op_traits import MATRIX_PRODUCTS
from bactrian.passes.stages import layer_partitioning
from bactrian.passes.stages.layer_graph import LayeredProgram
from bactrian.passes.stages.pinned_arguments import PinnedArguments, PinnedReads


def cut_forward(
    program: LayeredProgram, num_layers: int, num_stages: int, epsilon: float, main: ir.Operation, ctx: PassContext
) -> list[int | None] | None:
    """The layer of each forward op that is not free (None for all other ops); None if it can't be done.

    Errors are about stages where there are to be ``num_stages`` of them and no more layers than that.
    """
    flow = program.flow
    ops = [i for i, phase in enumerate(program.phases) if phase == FORWARD and not program.free[i]]
    weighty = [program.batch[i] and flow.ops[i].name in MATRIX_PRODUCTS for i in ops]
    kind = ("matrix product or convolution", "matrix products or convolutions")
    if not any(weighty):
        weighty = [program.batch[i] and not program.marker[i] for i in ops]
        kind = ("op that depends on the batch", "ops that depend on the batch")
    order = _order(program, ops, weighty)
    ops, weighty = [ops[i] for i in order], [weighty[i] for i in order]
    position = {op: place for place, op in enumerate(ops)}
    model = CostModel()
    flops = [model.flops(flow.ops[i]) for i in ops]
    lifetimes = [(place, last, program.bytes[value]) for value, place, last in _lifetimes(program, position)]
    crossing = layer_partitioning.cut_bytes(len(ops), lifetimes)
    allowed = _marker_positions([program.marker[i] for i in ops], weighty)
    num_layers = num_layers or len(allowed or ()) + 1
    limited = "at stage boundaries" if allowed is not None else ""
    request = _Request(flops, weighty, crossing, num_layers, epsilon, allowed, None, kind, limited, num_stages)
    layers: list[int | None] = [None] * len(flow.ops)
    if num_layers > 1:
        if not request.check(main, ctx):
            return None
        cut = _cut_with_pinned(program, ops, request, main, ctx)
        if cut is None:
            return None
        groups = cut.group_of(len(ops))
        ctx.count("cut-bytes", cut.bytes)
    else:
        groups = [0] * len(ops)
    for op, group in zip(ops, groups, strict=True):
        layers[op] = group
    return layers


def _order(program: LayeredProgram, ops: list[int], weighty: list[bool]) -> list[int]:
    """The normalized order of forward ops, as positions in ``ops``. Stage boundaries keep their place."""
    number = {op: place for place, op in enumerate(ops)}
    producer = program.flow.producer
    # Through the boundary's own result, not through the value that it passes on: readers come after it.
    operands = [
        [number[producer[value]] for value in program.flow.operands[op] if producer[value] in number] for op in ops
    ]
    anchors = [heavy or program.marker[op] for op, heavy in zip(ops, weighty, strict=True)]
    return layer_partitioning.normalized_order(operands, anchors)


def _kept_positions(program: LayeredProgram, position: dict[int, int]) -> list[int] | None:
    """Where every value that crosses is kept for the backward phase; None if the program recomputes nothing.

    `jax.checkpoint` computes forward ops again in the backward phase, behind an optimization barrier. A cut inside of
    such a part would have its beginning computed again on the layer of its end, because backward edges go down.
    """
    recomputes = any(
        phase == BACKWARD and op.name == "stablehlo.optimization_barrier"
        for op, phase in zip(program.flow.ops, program.phases, strict=True)
    )
    if not recomputes:
        return None
    inner = [
        (place, last, 1)
        for value, place, last in _lifetimes(program, position)
        if not any(program.phases[reader] == BACKWARD for reader in program.readers[value])
    ]
    return [
        place for place, count in enumerate(layer_partitioning.cut_bytes(len(position), inner).tolist()) if count == 0
    ]


def _lifetimes(program: LayeredProgram, position: dict[int, int]) -> list[tuple[int, int, int]]:
    """(value, position of its producer, position of its last forward reader) of each forward value read there."""
    lifetimes: list[tuple[int, int, int]] = []
    for op, place in position.items():
        if program.marker[op]:
            continue
        for value in program.flow.results[op]:
            last = max((position.get(reader, -1) for reader in program.readers[value]), default=-1)
            if last > place:
                lifetimes.append((value, place, last))
    return lifetimes


def _marker_positions(marker: Sequence[bool], weighty: Sequence[bool]) -> list[int] | None:
    """Where stage boundaries allow cuts: one position for boundaries with no weight between them. None without any."""
    if not any(marker):
        return None
    positions: list[int] = []
    weight = False
    last = max((place for place, heavy in enumerate(weighty) if heavy), default=-1)
    for place, here in enumerate(marker):
        weight = weight or weighty[place]
        if not here or place > last:
            continue
        if weight:
            positions.append(place + 1)
            weight = False
        elif positions:
            positions[-1] = place + 1
    return positions


@dataclass(frozen=True)
class _Request:
    """A cut that is wanted. ``kind`` says what has weight (one, several), ``limited`` where cuts may be (empty: anywhere)."""

    flops: list[float]
    weighty: list[bool]
    crossing: layer_partitioning.Ints
    num_layers: int
    epsilon: float
    allowed: list[int] | None
    choices: list[frozenset[int] | None] | None
    kind: tuple[str, str]
    limited: str
    num_stages: int

    def check(self, main: ir.Operation, ctx: PassContext) -> bool:
        """Whether there can be so many layers; reports an error if not."""
        allowed, weight = self.allowed, sum(self.weighty)
        if allowed is not None and self.num_layers > len(allowed) + 1:
            self._refuse(
                f"the program has {_count(len(allowed), 'stage boundary', 'stage boundaries')}",
                f"where a program has stage boundaries, layers are cut only there, and every layer needs 1 {self.kind[0]} or more",
                len(allowed) + 1,
                ", or add stage boundaries",
                main,
                ctx,
            )
            return False
        if weight < self.num_layers:
            has = f"the forward phase has {_count(weight, *self.kind)}"
            self._refuse(has, "every layer needs one", max(1, weight), "", main, ctx)
            return False
        return True

    def _refuse(self, has: str, why: str, most: int, or_else: str, main: ir.Operation, ctx: PassContext) -> None:
        """Report that there can't be so many stages, where these were asked for, or layers."""
        count = self.num_layers
        if count == self.num_stages:
            message, name = f"{count} stages need at least {count} layers, and {has}", "num_stages"
        else:
            message, name = f"cannot make {count} layers: {has}", "num_layers"
        ctx.error(main, message, why=why, fix=f"{name} <= {most}{or_else}")

    def cut(self) -> layer_partitioning.LayerCut | None:
        """The cheapest cut, or None."""
        return layer_partitioning.cut(
            self.flops, self.weighty, self.crossing, self.num_layers, self.epsilon, self.allowed, self.choices
        )

    def remark(self, cut: layer_partitioning.LayerCut, main: ir.Operation, ctx: PassContext) -> None:
        """Tells if a cut is less balanced than asked."""
        if cut.largest > (1 + self.epsilon) * cut.share * (1 + 1e-6):
            ctx.remark(
                main,
                f"the largest of {self.num_layers} layers has {cut.largest / cut.share:.2f} times an even share of the "
                f"forward flops; no cut {self.limited or 'at all'} comes within {1 + self.epsilon:.2f} times; "
                "ask for fewer layers, or split the largest op",
            )


def _cut_with_pinned(
    program: LayeredProgram, ops: list[int], request: _Request, main: ir.Operation, ctx: PassContext
) -> layer_partitioning.LayerCut | None:
    """The cut that keeps pinned arguments on their stages and, if it can, recomputed parts whole; None after an error."""
    pinned = program.pinned
    if pinned is not None and pinned.num_stages != request.num_layers:
        ctx.remark(
            main,
            f"{_count(len(pinned.of), 'argument is', 'arguments are')} on {pinned.num_stages} stages already, which "
            f"{request.num_layers} layers do not keep to; ask for {pinned.num_stages} layers to leave them there",
        )
        pinned = None
    asked = [request]
    reads = _pinned_reads(program, pinned, ops) if pinned is not None else None
    if reads is not None:
        limited = f"{request.limited} that leaves arguments on their stages".strip()
        few = reads.only(program.large)
        asked = [replace(request, choices=r.choices(), limited=limited) for r in (reads, few)]
    if request.allowed is None:
        kept = _kept_positions(program, {op: place for place, op in enumerate(ops)})
        if kept is not None:
            where = "between parts that are computed again"
            asked = [variant for one in asked for variant in (replace(one, allowed=kept, limited=where), one)]
    for one in asked:
        cut = one.cut()
        if cut is not None:
            one.remark(cut, main, ctx)
            return cut
    assert reads is not None, "as many weights as layers, or boundaries with weight between them"
    place, why = reads.only(program.large).conflict(request.allowed is not None)
    ctx.error(
        program.flow.ops[ops[place]],
        f"cannot leave the arguments on the {request.num_layers} stages that hold them",
        why=f"{why}; the step that made them placed them so",
        fix="read them in the order in which that step does, or pass bactrian.gather(...) of them, to place them anew",
    )
    return None


def _pinned_reads(program: LayeredProgram, pinned: PinnedArguments, ops: list[int]) -> PinnedReads:
    """The pinned arguments that each of ``ops`` reads, itself or through free ops, which go where they are read."""
    through: dict[int, frozenset[int]] = {argument: frozenset([argument]) for argument in pinned.of}
    found: dict[int, frozenset[int]] = {}
    for index, phase in enumerate(program.phases):
        if phase != FORWARD:
            continue
        read = frozenset[int]().union(*(through.get(value, ()) for value in program.reads[index]))
        found[index] = read
        if program.free[index]:
            through.update((result, read) for result in program.flow.results[index])
    return PinnedReads(pinned, [tuple(sorted(found[op])) for op in ops])


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
