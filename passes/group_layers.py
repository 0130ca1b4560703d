"""``group-layers``: every op gets the layer that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes import layering
from bactrian.passes.costs import HEAVY, CostModel
from bactrian.passes.errors import ConfigError, PassError
from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.homes import Homes, Reads
from bactrian.passes.program import (
    BACKWARD,
    BOUNDARY,
    FORWARD,
    STAGE_BOUNDARY,
    UPDATE,
    Dataflow,
    argument_roles,
    custom_call_target,
    integer,
    integer_attribute,
    main_function,
    phase_of,
    result_updates,
)

_NO_PHASE = ""  # boundary and return


@dataclass(frozen=True)
class GroupLayers(Pass):
    """Group the program into layers: forward by weight and cut bytes, the rest to what it reads.

    The forward ops are cut into ``num-layers`` contiguous groups of about equal flops, where the fewest bytes cross. If
    the program has stage boundaries, cuts are made only there; the boundaries are removed. Backward and update ops may
    stand anywhere, so they go where the bytes times the layers that they travel are least: a residual is free
    from the layer that makes it to the last that reads it in the forward phase, an argument is free where the forward
    phase reads it, an optimizer's state goes along with what updates it. What depends on neither the batch nor a large
    argument (constants, masks, random bits) is cheap to clone later and goes to its lowest reader (in the backward
    phase to its highest).

    If another program has placed arguments on stages (``bactrian.home``) and there are as many layers as stages, each
    layer is a stage: a forward op that reads such arguments is put on a stage that holds them all, and backward and
    update ops are drawn there. Only arguments of at most ``small-bytes`` may be read elsewhere, if there is no other
    way.

    Requires: ``bactrian.phase`` on every op (``infer-phases``).
    Ensures: ``bactrian.num_layers`` on the module and ``bactrian.layer`` on every op with a phase. Forward edges never
    go to a lower layer, backward edges never to a higher one. No stage boundary is left.

    Example: the boundary is where the second layer begins, and it is gone.

    ```mlir
    func.func public @main(%v: tensor<16x16xf32> {bactrian.role = "state"},
        %w: tensor<16x16xf32> {bactrian.role = "state"}, %x: tensor<4x16xf32> {bactrian.role = "batch"})
        -> tensor<4x16xf32> {
      %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"}
        : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
      %m = stablehlo.custom_call @bactrian.stage_boundary(%y) {bactrian.phase = "forward"}
        : (tensor<4x16xf32>) -> tensor<4x16xf32>
      %z = stablehlo.dot_general %m, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"}
        : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
      return %z : tensor<4x16xf32>
    }
    ```

    ```mlir
    module attributes {bactrian.num_layers = 2 : i64} {
      func.func public @main(%v: tensor<16x16xf32> {bactrian.role = "state"},
          %w: tensor<16x16xf32> {bactrian.role = "state"}, %x: tensor<4x16xf32> {bactrian.role = "batch"})
          -> tensor<4x16xf32> {
        %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0]
          {bactrian.layer = 0 : i64, bactrian.phase = "forward"}
          : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
        %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0]
          {bactrian.layer = 1 : i64, bactrian.phase = "forward"}
          : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
        return %z : tensor<4x16xf32>
      }
    }
    ```
    """

    name: ClassVar[str] = "group-layers"
    summary: ClassVar[str] = "group the ops into layers of equal weight with small cuts"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("cut-bytes", "bytes of forward values, summed over the cuts that each crosses"),
        Statistic("free", "ops that depend on neither the batch nor a large argument"),
        Statistic("placed", "backward and update ops placed by what they read"),
        Statistic("markers", "stage boundaries removed"),
    )

    num_layers: int = option(0, help="how many layers to make; 0: one more than there are stage boundaries")
    epsilon: float = option(0.1, help="by how much a layer's flops may exceed an even share")
    small_bytes: int = option(256, help="an argument of at most this many bytes is read anywhere for free")

    def check_options(self) -> None:
        """Neither the number of layers nor the slack is negative."""
        if self.num_layers < 0:
            raise ConfigError(f"num-layers is {self.num_layers}, must not be negative")
        if self.epsilon < 0:
            raise ConfigError(f"epsilon is {self.epsilon}, must not be negative")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Cut the forward ops, place all others, write the layers."""
        program = _Program.of(module, Dataflow.kept_or_read(module, ctx), self.small_bytes)
        layers = _cut_forward(program, self.num_layers, self.epsilon, module, ctx)
        if layers is None:
            return
        num_layers = 1 + max((layer for layer in layers if layer is not None), default=0)
        _place_free(program, layers, FORWARD)
        microbatches = integer_attribute(module.operation, "bactrian.num_microbatches") or 1
        homes = program.homes if program.homes is not None and program.homes.num_stages == num_layers else None
        placed = _place(program, homes, layers, num_layers, microbatches)
        for phase in (UPDATE, BACKWARD):
            _place_free(program, layers, phase)
        attributes = [integer(layer) for layer in range(num_layers)]
        for index, op in enumerate(program.flow.ops):
            layer = layers[index]
            if layer is not None and not program.marker[index]:
                op.attributes["bactrian.layer"] = attributes[layer]
        module.operation.attributes["bactrian.num_layers"] = integer(num_layers)
        _remove_markers(program)
        if not any(program.marker):
            ctx.keep(program.flow)
        ctx.count("free", sum(program.free))
        ctx.count("placed", placed)
        ctx.count("markers", sum(program.marker))


@dataclass(frozen=True)
class _Program:
    """``@main`` as numbers. A stage boundary's result is the same value as its operand."""

    flow: Dataflow
    phases: list[str]
    marker: list[bool]
    same: list[int]
    reads: list[tuple[int, ...]]
    readers: list[list[int]]
    bytes: list[int]
    batch: list[bool]
    free: list[bool]
    roles: list[str]
    next_of: dict[int, list[int]]
    boundary: int | None
    homes: Homes | None
    large: list[bool]

    @classmethod
    def of(cls, module: ir.Module, flow: Dataflow, small_bytes: int) -> _Program:
        """Read ``@main``.

        Raises:
            PassError: if an op has no phase.
        """
        main = main_function(module)
        model = CostModel()
        roles = argument_roles(main)
        sizes = [model.size(value.type).bytes for value in flow.values]
        targets = [custom_call_target(op) for op in flow.ops]
        marker = [target == STAGE_BOUNDARY for target in targets]
        same = list(range(len(flow.values)))
        reads: list[tuple[int, ...]] = []
        for index, operands in enumerate(flow.operands):
            reads.append(tuple(dict.fromkeys(same[value] for value in operands)))
            if marker[index]:
                for result, operand in zip(flow.results[index], operands, strict=True):
                    same[result] = same[operand]
        readers: list[list[int]] = [[] for _ in flow.values]
        for index, values in enumerate(reads):
            for value in values:
                readers[value].append(index)
        boundary = next((index for index, target in enumerate(targets) if target == BOUNDARY), None)
        phases = [_phase(flow, index, boundary) for index in range(len(flow.ops))]
        batch, free = _dependence(flow, reads, roles, sizes, phases, marker, small_bytes)
        next_of: dict[int, list[int]] = {}
        for value, argument in zip(flow.operands[-1], result_updates(main), strict=True):
            if argument is not None:
                next_of.setdefault(same[value], []).append(argument)
        homes = Homes.read(module, flow)
        large = [size > small_bytes for size in sizes[: flow.num_arguments]]
        return cls(
            flow, phases, marker, same, reads, readers, sizes, batch, free, roles, next_of, boundary, homes, large
        )


def _phase(flow: Dataflow, index: int, boundary: int | None) -> str:
    if index == boundary or index == len(flow.ops) - 1:
        return _NO_PHASE
    op = flow.ops[index]
    phase = phase_of(op)
    if phase is None:
        raise PassError(f"bactrian.phase is missing on {op.name}", where=str(op.location), fix="run infer-phases first")
    return phase


def _dependence(
    flow: Dataflow,
    reads: Sequence[tuple[int, ...]],
    roles: Sequence[str],
    sizes: Sequence[int],
    phases: Sequence[str],
    marker: Sequence[bool],
    small_bytes: int,
) -> tuple[list[bool], list[bool]]:
    """For each op: whether it depends on the batch, and whether it depends on neither batch nor a large argument."""
    from_batch = [role == "batch" for role in roles] + [False] * (len(sizes) - len(roles))
    bound = [role == "batch" or size > small_bytes for role, size in zip(roles, sizes, strict=False)]
    bound += [False] * (len(sizes) - len(roles))
    batch: list[bool] = []
    free: list[bool] = []
    for index, op in enumerate(flow.ops):
        batch.append(any(from_batch[value] for value in reads[index]))
        tied = any(bound[value] for value in reads[index]) or op.name in HEAVY or marker[index]
        free.append(not tied and phases[index] != _NO_PHASE)
        for result in flow.results[index]:
            from_batch[result] = batch[index]
            bound[result] = tied or phases[index] == _NO_PHASE
    return batch, free


def _cut_forward(
    program: _Program, num_layers: int, epsilon: float, module: ir.Module, ctx: PassContext
) -> list[int | None] | None:
    """The layer of each forward op that is not free (None for all other ops); None if it can't be done."""
    flow = program.flow
    ops = [i for i, phase in enumerate(program.phases) if phase == FORWARD and not program.free[i]]
    weighty = [program.batch[i] and flow.ops[i].name in HEAVY for i in ops]
    kind = "with weight"
    if not any(weighty):
        weighty = [program.batch[i] and not program.marker[i] for i in ops]
        kind = "that depend on the batch"
    order = _order(program, ops, weighty)
    ops, weighty = [ops[i] for i in order], [weighty[i] for i in order]
    position = {op: place for place, op in enumerate(ops)}
    model = CostModel()
    flops = [model.flops(flow.ops[i]) for i in ops]
    lifetimes = [(place, last, program.bytes[value]) for value, place, last in _lifetimes(program, position)]
    crossing = layering.cut_bytes(len(ops), lifetimes)
    allowed = _marker_positions([program.marker[i] for i in ops], weighty)
    num_layers = num_layers or len(allowed or ()) + 1
    limited = "at stage boundaries" if allowed is not None else ""
    request = _Request(flops, weighty, crossing, num_layers, epsilon, allowed, None, kind, limited)
    layers: list[int | None] = [None] * len(flow.ops)
    if num_layers > 1:
        if not request.check(module, ctx):
            return None
        cut = _cut_at_homes(program, ops, request, module, ctx)
        if cut is None:
            return None
        groups = cut.group_of(len(ops))
        ctx.count("cut-bytes", cut.bytes)
    else:
        groups = [0] * len(ops)
    for op, group in zip(ops, groups, strict=True):
        layers[op] = group
    return layers


def _order(program: _Program, ops: list[int], weighty: list[bool]) -> list[int]:
    """The normalized order of forward ops, as positions in ``ops``. Stage boundaries keep their place."""
    number = {op: place for place, op in enumerate(ops)}
    producer = program.flow.producer
    # Through the boundary's own result, not through the value that it passes on: readers come after it.
    operands = [
        [number[producer[value]] for value in program.flow.operands[op] if producer[value] in number] for op in ops
    ]
    anchors = [heavy or program.marker[op] for op, heavy in zip(ops, weighty, strict=True)]
    return layering.normalized_order(operands, anchors)


def _kept_positions(program: _Program, position: dict[int, int]) -> list[int] | None:
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
    return [place for place, count in enumerate(layering.cut_bytes(len(position), inner).tolist()) if count == 0]


def _lifetimes(program: _Program, position: dict[int, int]) -> list[tuple[int, int, int]]:
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
    """A cut that is wanted. ``kind`` says what weight is, ``limited`` where cuts may be (empty: anywhere)."""

    flops: list[float]
    weighty: list[bool]
    crossing: layering.Ints
    num_layers: int
    epsilon: float
    allowed: list[int] | None
    choices: list[frozenset[int] | None] | None
    kind: str
    limited: str

    def check(self, module: ir.Module, ctx: PassContext) -> bool:
        """Whether there can be so many layers; reports an error if not."""
        allowed, num_layers, weight = self.allowed, self.num_layers, sum(self.weighty)
        if allowed is not None and num_layers > len(allowed) + 1:
            ctx.error(
                module.operation,
                f"cannot cut at {_count(len(allowed), 'stage boundary', 'stage boundaries')} into {num_layers} layers",
                why="where a program has stage boundaries, layers are cut only there, and every layer needs "
                + ("a product or convolution" if self.kind == "with weight" else "an op that depends on the batch"),
                fix=f"ask for at most {len(allowed) + 1} layers, or add stage boundaries",
            )
            return False
        if weight < num_layers:
            with_weight = self.kind == "with weight"
            ctx.error(
                module.operation,
                f"cannot cut {_count(weight, 'forward op', 'forward ops')} {self.kind} into {num_layers} layers",
                why="every layer needs a product or convolution" if with_weight else "every layer needs one",
                fix=f"ask for at most {max(1, weight)} layers",
            )
            return False
        return True

    def cut(self) -> layering.Cut | None:
        """The cheapest cut, or None."""
        return layering.cut(
            self.flops, self.weighty, self.crossing, self.num_layers, self.epsilon, self.allowed, self.choices
        )

    def remark(self, cut: layering.Cut, module: ir.Module, ctx: PassContext) -> None:
        """Tells if a cut is less balanced than asked."""
        if cut.largest > (1 + self.epsilon) * cut.share * (1 + 1e-6):
            ctx.remark(
                module.operation,
                f"the largest of {self.num_layers} layers has {cut.largest / cut.share:.2f} times an even share of the "
                f"forward flops; no cut {self.limited or 'at all'} comes within {1 + self.epsilon:.2f} times",
            )


def _cut_at_homes(
    program: _Program, ops: list[int], request: _Request, module: ir.Module, ctx: PassContext
) -> layering.Cut | None:
    """The cut that keeps arguments with homes there and, if it can, recomputed parts whole; None after an error."""
    homes = program.homes
    if homes is not None and homes.num_stages != request.num_layers:
        ctx.remark(
            module.operation,
            f"{_count(len(homes.of), 'argument is', 'arguments are')} on {homes.num_stages} stages already, which "
            f"{request.num_layers} layers do not keep to",
        )
        homes = None
    asked = [request]
    reads = _home_reads(program, homes, ops) if homes is not None else None
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
            one.remark(cut, module, ctx)
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


def _home_reads(program: _Program, homes: Homes, ops: list[int]) -> Reads:
    """The arguments with homes that each of ``ops`` reads, itself or through free ops, which go where they are read."""
    through: dict[int, frozenset[int]] = {argument: frozenset([argument]) for argument in homes.of}
    found: dict[int, frozenset[int]] = {}
    for index, phase in enumerate(program.phases):
        if phase != FORWARD:
            continue
        read = frozenset[int]().union(*(through.get(value, ()) for value in program.reads[index]))
        found[index] = read
        if program.free[index]:
            through.update((result, read) for result in program.flow.results[index])
    return Reads(homes, [tuple(sorted(found[op])) for op in ops])


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _place_free(program: _Program, layers: list[int | None], phase: str) -> None:
    """Free ops go to their lowest reader of the same phase (backward: highest), else to the lowest of all."""
    choose = max if phase == BACKWARD else min
    for index in range(len(layers) - 1, -1, -1):
        if program.phases[index] != phase or not program.free[index]:
            continue
        readers = [reader for value in program.flow.results[index] for reader in program.readers[value]]
        own = [layer for r in readers if program.phases[r] == phase and (layer := layers[r]) is not None]
        others = [layer for r in readers if (layer := layers[r]) is not None]
        layers[index] = choose(own) if own else min(others, default=0)


def _place(program: _Program, held: Homes | None, layers: list[int | None], num_layers: int, microbatches: int) -> int:
    """Place backward and update ops that are not free; returns how many there are.

    What happens once per microbatch counts ``microbatches`` times what happens once per step.
    """
    problem = layering.Placement(num_layers)
    nodes: dict[int, int] = {}
    for index, phase in enumerate(program.phases):
        if phase in (BACKWARD, UPDATE) and not program.free[index] and not program.marker[index]:
            nodes[index] = problem.node()
    homes = _homes(program, held, layers, problem)
    for value in range(len(program.flow.values)):
        _pay_for_value(program, layers, problem, nodes, homes, value, microbatches)
    solution = problem.solve()
    for op, node in nodes.items():
        layers[op] = solution[node]
    return len(nodes)


def _homes(
    program: _Program, held: Homes | None, layers: list[int | None], problem: layering.Placement
) -> dict[int, list[int]]:
    """Where each argument lives: the lowest and highest layer that hold it already or read it forward, else a variable.

    A batch argument lives there as well: other stages could load it, too, but then the gradient of the first layer's
    weight would be computed on the second whenever it is smaller than the cotangent.
    """
    homes: dict[int, list[int]] = {}
    for argument in range(len(program.roles)):
        forward = [
            layer
            for reader in program.readers[argument]
            if program.phases[reader] == FORWARD and (layer := layers[reader]) is not None
        ]
        forward.extend(held.of.get(argument, ()) if held is not None else ())
        homes[argument] = [problem.at(min(forward)), problem.at(max(forward))] if forward else [problem.node()]
    return homes


def _pay_for_value(
    program: _Program,
    layers: list[int | None],
    problem: layering.Placement,
    nodes: dict[int, int],
    homes: dict[int, list[int]],
    value: int,
    microbatches: int,
) -> None:
    """Add one value's travels to the problem."""
    if program.same[value] != value:
        return
    op = program.flow.producer[value]
    if op >= 0 and (op == program.boundary or program.free[op]):
        return
    size = program.bytes[value]
    backward = [nodes[r] for r in program.readers[value] if program.phases[r] == BACKWARD and r in nodes]
    update = _update_ends(program, nodes, homes, value)
    if op < 0:
        problem.pay_span([*homes[value], *backward], size * microbatches)
        problem.pay_span([*homes[value], *update], size)
    elif program.phases[op] == FORWARD:
        own = layers[op]
        assert own is not None
        last = max((layers[r] or 0 for r in program.readers[value] if program.phases[r] == FORWARD), default=own)
        problem.pay_span([problem.at(own), problem.at(max(own, last)), *backward], size * microbatches)
        problem.pay_span([problem.at(own), *update], size)
    elif program.phases[op] == BACKWARD:
        for reader in backward:
            problem.require(nodes[op], reader)
        if backward:
            problem.pay(nodes[op], problem.lowest(backward), size * microbatches)
        problem.pay_span([nodes[op], *update], size)
    else:
        problem.pay_span([nodes[op], *update], size)


def _update_ends(program: _Program, nodes: dict[int, int], homes: dict[int, list[int]], value: int) -> list[int]:
    """What a value travels to once per step: update ops, and the home of the argument that it is the next value of.

    A value that passes the boundary is the same value behind it.
    """
    same = [value]
    boundary = program.boundary
    if boundary is not None and boundary in program.readers[value]:
        passed = zip(program.flow.operands[boundary], program.flow.results[boundary], strict=True)
        same.extend(result for operand, result in passed if program.same[operand] == value)
    readers = [nodes[r] for v in same for r in program.readers[v] if program.phases[r] == UPDATE and r in nodes]
    return readers + [end for v in same for argument in program.next_of.get(v, ()) for end in homes.get(argument, ())]


def _remove_markers(program: _Program) -> None:
    """Replace every stage boundary by what it passes on."""
    for index, op in enumerate(program.flow.ops):
        if program.marker[index]:
            for result, operand in zip(op.results, op.operands, strict=True):
                result.replace_all_uses_with(operand)
            op.erase()
