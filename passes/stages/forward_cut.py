"""Where forward ops are cut into layers: by predicted time, bytes that cross, stage boundaries and pinned arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.ir.attributes import BACKWARD, FORWARD, UPDATE
from bactrian.passes.ir.regions import has_product
from bactrian.passes.sharding.loop_dataflow import WHILE
from bactrian.passes.stages import layer_partitioning
from bactrian.passes.stages.layer_graph import LayeredProgram
from bactrian.passes.stages.layer_partitioning import Ints
from bactrian.passes.stages.pinned_arguments import PinnedArguments, PinnedReads
from bactrian.passes.stages.placement_by_forward import place_by_forward
from bactrian.passes.stages.repeated_blocks import (
    OpsInOrder,
    RunCuts,
    allowed_cuts,
    block_layers,
    repeated_runs,
    run_cuts,
)
from bactrian.passes.stages.uneven_stages import FAR

_PAYS = 1.5
"""How much faster the slowest layer has to become for a part that is computed again to be cut: the layer of its end then
computes all of it again, and gets what its beginning reads, parameters included."""

_ABOUT_AS_EVEN = 1.15
"""The slowest layer of a cut that leaves repeated blocks whole, as a multiple of that of another cut."""

_Limit = tuple[str, str]  # where cuts may be, and what to do where that is not even
_AT_BOUNDARIES: _Limit = ("at stage boundaries", "move or remove some of them")
_AS_PLACED: _Limit = ("so that arguments stay on their stages", "pass bactrian.gather(...) of them to place them anew")
_BETWEEN_PARTS: _Limit = ("between parts that are computed again", "put jax.checkpoint around smaller parts")


def cut_forward(
    program: LayeredProgram,
    seconds: Sequence[float],
    num_layers: int,
    num_stages: int,
    epsilon: float,
    most_layers: int,
    main: ir.Operation,
    ctx: PassContext,
) -> list[int | None] | None:
    """The layer of each forward op that is not free (None for all other ops); None if it can't be done.

    Errors are about stages where there are to be ``num_stages`` of them and no more layers than that.

    Args:
        program: the program.
        seconds: of one run of each op.
        num_layers, num_stages, epsilon, most_layers: the options of ``group-layers``.
        main: the function, for errors.
        ctx: told of errors, and of layers that are not even.
    """
    flow = program.flow
    ops = [i for i, phase in enumerate(program.phases) if phase == FORWARD and not program.free[i]]
    weighty = [program.batch[i] and has_product(flow.ops[i]) for i in ops]
    kind = ("matrix product or convolution", "matrix products or convolutions")
    is_looped = any(heavy and flow.ops[i].name == WHILE for i, heavy in zip(ops, weighty, strict=True))
    if not any(weighty) or (is_looped and sum(weighty) < num_layers):  # a loop is not cut: what is around it can be
        weighty = [program.batch[i] and not program.marker[i] for i in ops]
        kind = ("op that depends on the batch", "ops that depend on the batch")
    order = _order(program, ops, weighty)
    ops, weighty = [ops[i] for i in order], [weighty[i] for i in order]
    position = {op: place for place, op in enumerate(ops)}
    lifetimes = [
        (place, last, program.bytes[value])
        for value, place, last in _lifetimes(program, position)
        if not program.cheap[flow.producer[value]]
    ]
    crossing = layer_partitioning.cut_bytes(len(ops), lifetimes)
    allowed = _marker_positions([program.marker[i] for i in ops], weighty)
    cuts = _run_cuts(program, ops, weighty, seconds, crossing) if allowed is None else []
    layers: list[int | None] = [None] * len(flow.ops)
    if not num_layers and allowed is None and most_layers:
        starts = block_layers(cuts, OpsInOrder(_weights(program, ops, seconds), weighty, crossing), most_layers)
        ctx.count("cut-bytes", int(crossing[starts].sum()))
        groups = (np.searchsorted(starts, np.arange(len(ops)), side="right") - 1).tolist()
    else:
        num_layers = num_layers or len(allowed or ()) + 1
        limits = () if allowed is None else (_AT_BOUNDARIES,)
        weights = _weights(program, ops, seconds) if sum(weighty) >= num_layers > 1 else []
        blocks = allowed_cuts(cuts, len(ops)) if cuts else None
        request = _Request(
            weights, weighty, crossing, num_layers, epsilon, allowed, None, kind, limits, num_stages, blocks
        )
        groups = _groups(program, ops, request, main, ctx)
    if groups is None:
        return None
    for op, group in zip(ops, groups, strict=True):
        layers[op] = group
    return layers


def _groups(
    program: LayeredProgram, ops: list[int], request: _Request, main: ir.Operation, ctx: PassContext
) -> list[int] | None:
    """The layer of each of ``ops``; None after an error."""
    if request.num_layers == 1:
        return [0] * len(ops)
    pinned, cut = program.pinned, None
    if pinned is None or pinned.num_stages != request.num_layers or sum(request.weighty) >= request.num_layers:
        if not request.check(main, ctx):
            return None
        cut = _cut_with_pinned(program, ops, request, main, ctx)
    if cut is not None:
        ctx.count("cut-bytes", cut.bytes)
        return cut.group_of(len(ops))
    assert pinned is not None, "as many weights as layers, or boundaries with weight between them"
    return _with_arguments(program, ops, pinned, ctx)


def _weights(program: LayeredProgram, ops: list[int], seconds: Sequence[float]) -> list[float]:
    """Seconds of a step that go with each of the forward ops ``ops``: its own, and those of backward and update ops.

    These are placed as if every forward op were a layer, and counted with the op of their layer. What a stage takes in
    the end is the sum, wherever the cuts are.
    """
    layers: list[int | None] = [None] * len(program.flow.ops)
    for place, op in enumerate(ops):
        layers[op] = place
    place_by_forward(program, None, layers, len(ops))
    weights = [program.microbatches * seconds[op] for op in ops]
    for op, phase in enumerate(program.phases):
        layer = layers[op]
        if layer is not None and phase in (BACKWARD, UPDATE):
            weights[layer] += seconds[op] * (program.microbatches if phase == BACKWARD else 1)
    return weights


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


def _run_cuts(
    program: LayeredProgram, ops: list[int], weighty: list[bool], seconds: Sequence[float], crossing: Ints
) -> list[RunCuts]:
    """Where cuts keep repeated blocks equal, by runs of such."""
    places = [place for place, heavy in enumerate(weighty) if heavy]
    keys = [_anchor_key(program.flow.ops[ops[place]]) for place in places]
    runs = repeated_runs(keys, places, [seconds[ops[place]] for place in places])
    return run_cuts(runs, places, crossing)


def _anchor_key(op: ir.Operation) -> tuple[object, ...]:
    """What an op does, and to what shapes."""
    attributes = op.attributes
    items = (attributes[number] for number in range(len(attributes)))
    return op.name, *((item.name, item.attr) for item in items), *(value.type for value in (*op.operands, *op.results))


def _kept_positions(program: LayeredProgram, position: dict[int, int]) -> list[int] | None:
    """Where every value that crosses is kept for the backward phase; None if the program recomputes nothing.

    `jax.checkpoint` computes forward ops again in the backward phase, behind an optimization barrier. A cut inside of
    such a part would have its beginning computed again on the layer of its end, because backward edges go down. What
    several such parts read is left out where each of them computes it again for itself, without a product or a
    parameter: a mask.
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
        if not program.shallow[program.flow.producer[value]]
        and not any(program.phases[reader] == BACKWARD for reader in program.readers[value])
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
    """A cut that is wanted. ``kind`` says what has weight (one, several), ``limits`` where cuts may be, ``blocks`` where they
    keep repeated blocks equal."""

    weights: list[float]
    weighty: list[bool]
    crossing: layer_partitioning.Ints
    num_layers: int
    epsilon: float
    allowed: list[int] | None
    choices: list[frozenset[int] | None] | None
    kind: tuple[str, str]
    limits: tuple[_Limit, ...]
    num_stages: int
    blocks: list[int] | None = None

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
        """The cheapest cut, or None; between repeated blocks, where no more bytes cross and layers are about as even."""
        anywhere = self._cut_at(self.allowed)
        if anywhere is None or self.blocks is None:
            return anywhere
        at = self.blocks if self.allowed is None else sorted({*self.blocks}.intersection(self.allowed))
        between = self._cut_at(at)
        if between is None or between.bytes > anywhere.bytes:
            return anywhere
        even = max((1 + self.epsilon) * anywhere.share, _ABOUT_AS_EVEN * anywhere.largest)
        return between if between.largest <= even else anywhere

    def _cut_at(self, allowed: Sequence[int] | None) -> layer_partitioning.LayerCut | None:
        return layer_partitioning.cut(
            self.weights, self.weighty, self.crossing, self.num_layers, self.epsilon, allowed, self.choices
        )

    def remark(self, cut: layer_partitioning.LayerCut, main: ir.Operation, ctx: PassContext) -> None:
        """Tells if what limits the cuts leaves layers far less even than asked."""
        if self.limits and cut.largest > max(1 + self.epsilon, FAR) * cut.share:
            places, fixes = zip(*self.limits, strict=True)
            ctx.remark(
                main,
                f"cut {' and '.join(places)}, the largest of {self.num_layers} layers takes "
                f"{cut.largest / cut.share:.2f} times an even share of the predicted time",
                fix=", or ".join(fixes),
            )


def _cut_with_pinned(
    program: LayeredProgram, ops: list[int], request: _Request, main: ir.Operation, ctx: PassContext
) -> layer_partitioning.LayerCut | None:
    """The cut that keeps pinned arguments on their stages and, if it can, recomputed parts whole; None if a stage would
    have no weight."""
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
        limits = (*request.limits, _AS_PLACED)
        few = reads.only(program.large)
        asked = [replace(request, choices=r.choices(), limits=limits) for r in (reads, few)]
    kept = _kept_positions(program, {op: place for place, op in enumerate(ops)}) if request.allowed is None else None
    for one in asked:
        chosen, cut = _around_parts(one, kept)
        if cut is not None:
            chosen.remark(cut, main, ctx)
            return cut
    return None


def _with_arguments(
    program: LayeredProgram, ops: list[int], pinned: PinnedArguments, ctx: PassContext
) -> list[int] | None:
    """The layer of each of ``ops`` where no cut leaves work to every stage: the first stage that has all pinned arguments
    that an op reads, and is not before what it reads. Stages may have no op. None after an error."""
    reads = _pinned_reads(program, pinned, ops)
    large = reads.only(program.large)
    layers: dict[int, int] = {}
    causes: dict[int, int | None] = {}  # the argument that keeps an op from lower layers
    for place, (op, *choices) in enumerate(zip(ops, reads.choices(), large.choices(), strict=True)):
        producers = [program.flow.producer[value] for value in program.flow.operands[op]]
        before = max((producer for producer in producers if producer in layers), key=layers.__getitem__, default=None)
        low, cause = (0, None) if before is None else (layers[before], causes[before])
        stages = next(filter(None, (_from(low, choice, pinned.num_stages) for choice in choices)), None)
        if stages is None:
            ctx.error(
                program.flow.ops[op],
                f"cannot leave the arguments on the {pinned.num_stages} stages that hold them",
                why=f"{large.conflict(place, cause)}; the step that made them placed them so",
                fix="read them in the order in which that step does, or pass bactrian.gather(...) of them, to place them anew",
            )
            return None
        layers[op] = stages[0]
        causes[op] = large.last(place) if stages[0] > low else cause
    return [layers[op] for op in ops]


def _from(low: int, choice: frozenset[int] | None, num_stages: int) -> list[int]:
    """The stages of a choice (None: any) that are not before ``low``."""
    return [stage for stage in range(low, num_stages) if choice is None or stage in choice]


def _around_parts(request: _Request, kept: list[int] | None) -> tuple[_Request, layer_partitioning.LayerCut | None]:
    """The cut at ``kept`` positions, between parts that are computed again, unless one through them is far more even;
    with the request that it is the answer to."""
    anywhere = request.cut()
    if kept is None or anywhere is None:
        return request, anywhere
    between = replace(request, allowed=kept, limits=(*request.limits, _BETWEEN_PARTS))
    cut = between.cut()
    return (between, cut) if cut is not None and cut.largest <= _PAYS * anywhere.largest else (request, anywhere)


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
