"""``split-stages``: one function per stage and phase, and every transfer between stages in sight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    ACCUMULATE,
    ACCUMULATOR,
    ALIAS,
    ARGUMENT,
    COUNTER,
    FUSED,
    INITIALIZE,
    LAYER,
    MICROBATCH_INDEX,
    PARTIAL,
    PHASE,
    RESULT,
    ROLE,
    ROUND,
    STAGE,
    UPDATE,
    UPDATES,
    integer,
    read_num_stages,
    result_updates,
)
from bactrian.passes.ir.builders import scalar_i32
from bactrian.passes.ir.gradient_boundary_op import ACCUMULATED, boundary_words, find_boundary
from bactrian.passes.ir.meshes import (
    SHARDING,
    mesh_attribute,
    mesh_name,
    mesh_tensor,
    sharding_attribute,
    stage_axes,
    value_shardings,
)
from bactrian.passes.ir.module_schedule import fused_phases
from bactrian.passes.ir.regions import main_function, replace_reads
from bactrian.passes.machine.spec import Spec, num_devices
from bactrian.passes.stages.stage_functions import Crossing, FunctionPartition, StageFunction, analyze


@dataclass(frozen=True)
class SplitStages(Pass):
    """Cut ``@main`` into stage functions and explicit transfers.

    Each stage gets a function per phase; under 1F1B the last stage's forward and backward of a microbatch follow each
    other at once and are one function; one stage with one microbatch is one function altogether. Residuals stay on their
    stage, as results of the forward and operands of the backward function. A value that another stage reads is one
    ``mpmd.transfer`` per reading stage. The update is cut into rounds where it needs values of other stages. The new
    ``@main`` is the data flow of one microbatch on ``!mpmd.mesh_tensor`` types, so that the verifier refuses a value used
    on the wrong mesh.

    Requires: accumulators explicit (``accumulate-gradients``).
    Ensures: the staged form of ``docs/ir.md``; accumulators and state are aliased with the results that replace them.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
      func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %y = stablehlo.negate %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %z = stablehlo.cosine %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
        %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
          {kinds = "output", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
        return %b : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
      func.func public @main(%arg0: !mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.argument = 0 : i64, bactrian.role = "batch"}) -> (!mpmd.mesh_tensor<"stage1", tensor<4xf32>> {bactrian.result = 0 : i64}) attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
        %0 = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @stage0.forward(%arg0) {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        %1 = mpmd.transfer %0 : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
        %2 = mpmd.fragment_call<mesh="stage1", origin=["forward"]> @stage1.forward(%1) {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
        return %2 : !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
      }
      func.func private @stage0.forward(%arg0: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        %0 = stablehlo.negate %arg0 : tensor<4xf32>
        return %0 : tensor<4xf32>
      }
      func.func private @stage1.forward(%arg0: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        %0 = stablehlo.cosine %arg0 : tensor<4xf32>
        return %0 : tensor<4xf32>
      }
    }
    ```

    Each op is in its stage's function, and the activation that crosses is a transfer.
    """

    name: ClassVar[str] = "split-stages"
    summary: ClassVar[str] = "cut @main into one function per stage and phase, with explicit transfers"
    requires: ClassVar[tuple[str, ...]] = (
        "formed",
        "flat",
        "typed",
        "marked",
        "with-phases",
        "with-stages",
        "with-num-stages",
        "with-boundary",
    )
    ensures: ClassVar[tuple[str, ...]] = ("split",)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("functions", "stage functions"),
        Statistic("transfers", "transfers in the data flow of one microbatch"),
        Statistic("transfer-bytes", "bytes of these transfers"),
        Statistic("residuals", "values kept from a forward to a backward function"),
    )

    donate: bool = option(True, help="let the update reuse the buffers of the old state")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Replace the captured ``@main`` by the staged one."""
        main = main_function(module)
        if not self._check(module, main, ctx):
            return
        num_stages = read_num_stages(module)
        staging = analyze(main, [fused_phases(module, main, stage) for stage in range(num_stages)])
        _Emitter(module, main, staging, num_stages, self.donate).emit()
        ctx.count("functions", len(staging.functions))
        ctx.count("transfers", len(staging.crossings))
        ctx.count("transfer-bytes", sum(staging.sizes[crossing.value] for crossing in staging.crossings))
        ctx.count("residuals", _count_residuals(staging))

    def _check(self, module: ir.Module, main: ir.Operation, ctx: PassContext) -> bool:
        boundary = find_boundary(main)
        pending = [word for word in boundary_words(boundary, "reductions") if word != ACCUMULATED]
        if pending:
            ctx.error(
                boundary,
                f"{len(pending)} of the gradient boundary's values have no accumulator yet",
                fix="run accumulate-gradients first",
            )
        return not pending


_OF_CAPTURED_OPS = (PHASE, STAGE, LAYER, ROUND, ACCUMULATE, PARTIAL, COUNTER)
"""What ops say that their stage function says from here on."""


def _count_residuals(staging: FunctionPartition) -> int:
    made = {value: f.key for f in staging.functions for value in f.outputs}
    return sum(
        1
        for function in staging.functions
        if function.key.phase == "backward"
        for value in function.inputs
        if value in made and made[value].phase == "forward" and made[value].stage == function.key.stage
    )


@dataclass(frozen=True)
class _MeshValues:
    """The values of the new ``@main``, by value of the captured one and stage that has it.

    What runs once per microbatch reads one, what runs once per step the other: a value that another stage needs for
    both has a transfer for each.
    """

    per_microbatch: dict[tuple[int, int], ir.Value] = field(default_factory=dict[tuple[int, int], ir.Value])
    per_step: dict[tuple[int, int], ir.Value] = field(default_factory=dict[tuple[int, int], ir.Value])

    def define(self, value: int, stage: int, made: ir.Value) -> None:
        """Add a value that the stage has for all that it runs."""
        self.per_microbatch[value, stage] = self.per_step[value, stage] = made


class _Emitter:
    """Writes the staged module from the analysis."""

    def __init__(
        self, module: ir.Module, main: ir.Operation, staging: FunctionPartition, num_stages: int, donate: bool
    ) -> None:
        self._module, self._main, self._staging = module, main, staging
        self._flow = staging.flow
        self._types = [value.type for value in staging.flow.values]
        self._locations = [value.location for value in staging.flow.values]
        self._updates = result_updates(main)
        self._arg_attributes = [ir.DictAttr(a) for a in ir.ArrayAttr(main.attributes["arg_attrs"])]
        self._mesh_types: dict[tuple[ir.Type, ir.Attribute | None, int], ir.Type] = {}
        self._axes = stage_axes(module, num_stages)
        # Shardings, where a stage has several devices.
        wide = any(num_devices(axes) > 1 for axes in self._axes)
        values = staging.flow.values
        self._shardings = value_shardings(main, values) if wide else [None] * len(values)
        # (value, stage) -> the argument that it is the next value of, and whose place it takes.
        self._replaced_arguments = {
            (value, stage): argument
            for result, stage, value in staging.result_pieces
            if (argument := self._updates[result]) is not None and argument != value
        }
        # (function number, input value) -> the output value that takes over its buffer.
        self._aliases = self._accumulator_aliases() | (self._donation_aliases() if donate else {})
        self._counters: dict[int, ir.Value] = {}
        self._crossings: dict[int, list[Crossing]] = {}
        for crossing in staging.crossings:
            self._crossings.setdefault(crossing.value, []).append(crossing)

    def emit(self) -> None:
        """Write the new ``@main`` in the place of the old one, and the stage functions behind it, in order of work.

        The functions are filled first: that takes all ops out of the old ``@main``, which can then be erased.
        """
        self._main.attributes["sym_name"] = ir.StringAttr.get("main.captured")
        for number, function in enumerate(self._staging.functions):
            self._emit_function(number, function)
        self._emit_main()
        self._main.erase()

    def _accumulator_aliases(self) -> dict[tuple[int, int], int]:
        """Each accumulator is written over its value of the microbatch before."""
        aliases: dict[tuple[int, int], int] = {}
        flow = self._flow
        for number, function in enumerate(self._staging.functions):
            for index in function.ops:
                op = flow.ops[index]
                if ACCUMULATE not in op.attributes:
                    continue
                before = flow.operands[index][0]
                producer = flow.producer[before]
                if producer < 0 or flow.phases[producer] != INITIALIZE:
                    raise error_at(
                        PassError,
                        op,
                        "an accumulator does not begin with a value of the initialize phase",
                        why="it would lose what the microbatches before have added",
                        fix="run accumulate-gradients, and no pass that folds constants after it",
                    )
                aliases[number, before] = flow.results[index][0]
        return aliases

    def _donation_aliases(self) -> dict[tuple[int, int], int]:
        """New state takes over the buffer of the old one, where nothing reads the old one afterwards."""
        aliases: dict[tuple[int, int], int] = {}
        num_arguments, staging = self._flow.num_arguments, self._staging
        last_reader = {
            (value, function.key.stage): number
            for number, function in enumerate(staging.functions)
            for value in function.inputs
        }
        returned_states = {(value, stage) for _, stage, value in staging.result_pieces if value < num_arguments}
        taken: set[int] = set()
        final = (UPDATE, FUSED) if staging.whole else (UPDATE,)
        for result, stage, value in staging.result_pieces:
            old = self._updates[result]
            if old is None or value < num_arguments or value in taken or (old, stage) in returned_states:
                continue
            number = last_reader.get((old, stage))
            key = staging.producer[value]
            if number is None or staging.functions[number].key != key or key.phase not in final:
                continue  # what runs once per microbatch must not use up the state that the next one reads
            if self._types[old] == self._types[value] and self._sharding(old, stage) == self._sharding(value, stage):
                aliases[number, old] = value
                taken.add(value)
        return aliases

    def _emit_function(self, number: int, function: StageFunction) -> None:
        """Move a function's ops into a ``func.func`` of their own."""
        ins = [self._types[value] for value in function.inputs]
        outs = [self._types[value] for value in function.outputs]
        if function.index_ops:
            ins.append(scalar_i32())
        with ir.InsertionPoint(self._module.body), self._main.location:
            operation = func.FuncOp(function.key.symbol, (ins, outs), visibility="private")
        block = operation.add_entry_block(self._input_locations(function))
        self._fill(function, block)
        stage, place = function.key.stage, {value: position for position, value in enumerate(function.outputs)}
        aliases = {v: place[self._aliases[number, v]] for v in function.inputs if (number, v) in self._aliases}
        attributes = [self._input_attributes(value, stage, aliases.get(value)) for value in function.inputs]
        if function.index_ops:
            index: dict[str, ir.Attribute] = {MICROBATCH_INDEX: ir.UnitAttr.get()}
            sharding = self._index_sharding(stage)
            attributes.append(ir.DictAttr.get(index if sharding is None else index | {SHARDING: sharding}))
        operation.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
        shardings = [self._sharding_entry(value, stage) for value in function.outputs]
        if any(shardings):
            operation.attributes["res_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in shardings])
        operation.attributes["mesh_shape"] = mesh_attribute(self._axes[stage])

    def _sharding(self, value: int, stage: int) -> ir.Attribute | None:
        """A value's sharding on a stage: the one in which it is made there, or received; None on one device.

        A value that the stage does neither with has that of the argument that it replaces, which may replace another one:
        leaves of a state that only change places have none, and are replicated.
        """
        if num_devices(self._axes[stage]) == 1:
            return None
        seen, source = set[int](), value
        while source not in seen:
            seen.add(source)
            made = self._shardings[source]
            if made is not None and mesh_name(made) == f"stage{stage}":
                return made
            if (received := self._staging.received.get((source, stage))) is not None:
                return received
            source = self._replaced_arguments.get((source, stage), source)
        rank = len(ir.RankedTensorType(self._types[value]).shape)
        return sharding_attribute(Spec.replicated(rank), f"stage{stage}")

    def _sharding_entry(self, value: int, stage: int) -> dict[str, ir.Attribute]:
        """A value's sharding as an attribute of an argument or a result of a function."""
        sharding = self._sharding(value, stage)
        return {} if sharding is None else {SHARDING: sharding}

    def _index_sharding(self, stage: int) -> ir.Attribute | None:
        return sharding_attribute(Spec.replicated(0), f"stage{stage}") if num_devices(self._axes[stage]) > 1 else None

    def _input_locations(self, function: StageFunction) -> list[ir.Location]:
        values = [self._locations[value] for value in function.inputs]
        return values + [ir.Location.name("microbatch_index")] * bool(function.index_ops)

    def _fill(self, function: StageFunction, block: ir.Block) -> None:
        flow = self._flow
        local = dict(zip(function.inputs, block.arguments, strict=False))
        through = self._staging.through
        index_argument = block.arguments[len(function.inputs)] if function.index_ops else None
        dropped = set(function.index_ops)
        given: dict[int, ir.Value] = {}
        for index in function.ops:
            op = flow.ops[index]
            if index in dropped:
                assert index_argument is not None
                op.results[0].replace_all_uses_with(index_argument)
                given[flow.results[index][0]] = index_argument
                op.erase()
                continue
            block.append(op)
            for read in dict.fromkeys(flow.operands[index]):
                value = through.get(read, read)
                if value in local:
                    replace_reads(op, flow.values[read], local[value])
                elif value != read:  # through the boundary, in the same function
                    replace_reads(op, flow.values[read], flow.values[value])
            for name in _OF_CAPTURED_OPS:
                if name in op.attributes:
                    del op.attributes[name]
        with ir.InsertionPoint(block), self._main.location:
            func.ReturnOp([given[value] if value in given else flow.values[value] for value in function.outputs])

    def _input_attributes(self, value: int, stage: int, alias: int | None) -> ir.DictAttr:
        """Of an argument that shares its buffer with the result at place ``alias``, if there is one."""
        attributes = self._sharding_entry(value, stage)
        if alias is None:
            return ir.DictAttr.get(attributes)
        attributes[ALIAS] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), alias)
        if value >= self._flow.num_arguments:
            attributes[ACCUMULATOR] = ir.UnitAttr.get()
        return ir.DictAttr.get(attributes)

    def _mesh_type(self, value: int, stage: int) -> ir.Type:
        key = self._types[value], self._sharding(value, stage), stage
        if key not in self._mesh_types:
            type_, sharding, _ = key
            self._mesh_types[key] = mesh_tensor(stage, type_, sharding)
        return self._mesh_types[key]

    def _emit_main(self) -> None:
        staging = self._staging
        ins = [self._mesh_type(argument, stage) for argument, stage in staging.argument_pieces]
        counters = sorted({function.key.stage for function in staging.functions if function.index_ops})
        scalar = scalar_i32()
        ins += [mesh_tensor(stage, scalar, self._index_sharding(stage)) for stage in counters]
        outs = [self._mesh_type(value, stage) for _, stage, value in staging.result_pieces]
        with ir.InsertionPoint(self._main), self._main.location:
            main = func.FuncOp("main", (ins, outs), visibility="public")
        locations = [self._locations[argument] for argument, _ in staging.argument_pieces]
        locations += [ir.Location.name("microbatch_index")] * len(counters)
        block = main.add_entry_block(locations)
        counter = ir.DictAttr.get({ROLE: ir.StringAttr.get("microbatch_index")})
        pieces = [self._piece(argument) for argument, _ in staging.argument_pieces]
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(pieces + [counter] * len(counters))
        main.attributes["res_attrs"] = ir.ArrayAttr.get(
            [self._result_attributes(result) for result, _, _ in staging.result_pieces]
        )
        meshes = ", ".join(
            f'<"stage{stage}" : {str(mesh_attribute(axes)).removeprefix("#sdy.mesh")}>'
            for stage, axes in enumerate(self._axes)
        )
        main.attributes["topology"] = ir.Attribute.parse(f"#mpmd.topology<{meshes}>")
        here = _MeshValues()
        for (argument, stage), value in zip(staging.argument_pieces, block.arguments, strict=False):
            here.define(argument, stage, value)
        for stage, value in zip(counters, list(block.arguments)[len(pieces) :], strict=True):
            self._counters[stage] = value
        with ir.InsertionPoint(block), self._main.location:
            for function in staging.functions:
                self._emit_call(function, here)
            func.ReturnOp([here.per_step[value, stage] for _, stage, value in staging.result_pieces])

    def _piece(self, argument: int) -> ir.DictAttr:
        old = self._arg_attributes[argument]
        return ir.DictAttr.get({ARGUMENT: integer(argument), ROLE: old[ROLE]})

    def _result_attributes(self, result: int) -> ir.DictAttr:
        attributes: dict[str, ir.Attribute] = {RESULT: integer(result)}
        updated = self._updates[result]
        if updated is not None:
            attributes[UPDATES] = integer(updated)
        return ir.DictAttr.get(attributes)

    def _emit_call(self, function: StageFunction, here: _MeshValues) -> None:
        """One fragment call, and the transfers of what it gives to other stages."""
        key = function.key
        read = here.per_step if key.phase == UPDATE else here.per_microbatch
        operands = [read[value, key.stage] for value in function.inputs]
        results = [self._mesh_type(value, key.stage) for value in function.outputs]
        if function.index_ops:
            operands.append(self._counters[key.stage])
        call = ir.Operation.create(
            "mpmd.fragment_call",
            results=results,
            operands=operands,
            attributes={
                "callee": ir.FlatSymbolRefAttr.get(key.symbol),
                "mesh_name": ir.StringAttr.get(f"stage{key.stage}"),
                "origin": ir.ArrayAttr.get([ir.Attribute.parse(f'#mpmd.user_origin<"{key.phase}">')]),
                PHASE: ir.StringAttr.get(key.phase),
                STAGE: integer(key.stage),
                **({ROUND: integer(key.round)} if key.round else {}),
            },
        )
        for value, result in zip(function.outputs, call.results, strict=True):
            here.define(value, key.stage, result)
            for crossing in self._crossings.get(value, []):
                received = here.per_step if crossing.once else here.per_microbatch
                received[value, crossing.target] = self._transfer(result, crossing)

    def _transfer(self, value: ir.Value, crossing: Crossing) -> ir.Value:
        attributes: dict[str, ir.Attribute] = {PHASE: ir.StringAttr.get(UPDATE)} if crossing.once else {}
        return ir.Operation.create(
            "mpmd.transfer",
            results=[self._mesh_type(crossing.value, crossing.target)],
            operands=[value],
            attributes=attributes,
        ).results[0]
