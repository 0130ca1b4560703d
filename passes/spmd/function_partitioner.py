"""From a stage function with shardings to the program of one device, in one ``sdy.manual_computation``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.builders import chosen, compared, splat
from bactrian.passes.ir.meshes import SHARDING, sharding_attribute, spec_of, spec_or_replicated, value_shardings
from bactrian.passes.ir.op_traits import LINEAR, SCALING
from bactrian.passes.ir.regions import body, nested_operands, nested_operations
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.spec import MeshAxes, Spec
from bactrian.passes.spmd.bit_sums import sum_of_bits
from bactrian.passes.spmd.bundling import bundle_reduce_scatters
from bactrian.passes.spmd.collectives import Collectives
from bactrian.passes.spmd.devices import Devices
from bactrian.passes.spmd.form_table import FORMS
from bactrian.passes.spmd.local_op import LocalOp, factor_axes, shards
from bactrian.passes.spmd.op_rules import drop_rules, rule_of
from bactrian.passes.spmd.reshards import Resharder

_RESHARD = "sdy.reshard"
_EASILY_SMALLER = ("stablehlo.broadcast_in_dim", "stablehlo.constant")
_CONSTRAINT = "sdy.sharding_constraint"
_WRITTEN_ANEW = frozenset({"stablehlo.dynamic_slice", "stablehlo.gather"})
"""Ops that XLA does wrong beside the slices and collectives of a device's program; their forms say how."""
FORWARDING = ("stablehlo.optimization_barrier",)


@dataclass(frozen=True)
class Shard:
    """What a device has of a value."""

    value: ir.Value
    spec: Spec


def partition_function(function: ir.Operation, mesh_name: str, axes: MeshAxes) -> None:
    """Rewrite a function, in place. Its signature stays that of whole tensors.

    Args:
        function: with ``sdy.sharding`` on arguments, results and ops, and with rules.
        mesh_name: the symbol of the mesh of its shardings.
        axes: of that mesh.

    Raises:
        PassError: at the op whose shardings no form can write.
    """
    with function.location:
        _FunctionPartitioner(function, mesh_name, axes).run()


class _FunctionPartitioner:
    def __init__(self, function: ir.Operation, mesh_name: str, axes: MeshAxes) -> None:
        self._function, self._mesh_name, self._axes = function, mesh_name, axes
        self._sizes = dict(axes)
        self._shards: dict[ir.Value, Shard] = {}

    def run(self) -> None:
        block = body(self._function)
        operations = [view.operation for view in block.operations]
        end = operations.pop()
        arguments, entries = list(block.arguments), argument_attributes(self._function)
        reads = [
            spec_or_replicated(entry.get(SHARDING), value.type) for value, entry in zip(arguments, entries, strict=True)
        ]
        makes = [
            spec_or_replicated(entry.get(SHARDING), value.type)
            for value, entry in zip(end.operands, result_attributes(self._function), strict=True)
        ]
        for value, spec in zip((*arguments, *end.operands), (*reads, *makes), strict=True):
            self._check(value, spec, self._function)
        manual = self._manual(end, arguments, reads, makes)
        inner = manual.regions[0].blocks[0]
        collectives = Collectives(Devices(self._axes, inner))
        self._collectives, self._resharder = collectives, Resharder(collectives)
        for value, argument, spec in zip(arguments, inner.arguments, reads, strict=True):
            self._shards[value] = Shard(argument, spec)
        self._block(operations, inner)
        with ir.InsertionPoint(inner), end.location:
            returned = [self._as(value, spec) for value, spec in zip(end.operands, makes, strict=True)]
            ir.Operation.create("sdy.return", operands=returned)
        bundle_reduce_scatters(inner, collectives)
        _erase_unread(manual)
        for number, result in enumerate(manual.results):
            end.operands[number] = result
        for op in reversed(operations):
            op.erase()
        drop_rules(self._function)

    def _manual(
        self, end: ir.Operation, arguments: Sequence[ir.Value], reads: Sequence[Spec], makes: Sequence[Spec]
    ) -> ir.Operation:
        names = ", ".join(f'"{name}"' for name, _ in self._axes)
        with ir.InsertionPoint(end), self._function.location:
            manual = ir.Operation.create(
                "sdy.manual_computation",
                results=[value.type for value in end.operands],
                operands=list(arguments),
                attributes={
                    "in_shardings": self._per_value(reads),
                    "out_shardings": self._per_value(makes),
                    "manual_axes": ir.Attribute.parse(f"#sdy<manual_axes{{{names}}}>"),
                },
                regions=1,
            )
        types = [self._type(value.type, spec) for value, spec in zip(arguments, reads, strict=True)]
        manual.regions[0].blocks.append(*types, arg_locs=[value.location for value in arguments])
        return manual

    def _per_value(self, specs: Sequence[Spec]) -> ir.Attribute:
        return sdy.TensorShardingPerValueAttr.get([sharding_attribute(spec, self._mesh_name) for spec in specs])

    def _type(self, type_: ir.Type, spec: Spec) -> ir.Type:
        if not isinstance(type_, ir.RankedTensorType):
            return type_
        return ir.RankedTensorType.get(spec.local_shape(type_.shape, self._sizes), type_.element_type)

    def _check(self, value: ir.Value, spec: Spec, op: ir.Operation) -> None:
        shape = value_shape(value)
        unknown = sorted({axis for axis in (*spec.axes, *spec.unreduced) if axis not in self._sizes})
        if unknown:
            raise error_at(
                PassError,
                op,
                f"sharding {spec} names the axis {unknown[0]}, which @{self._mesh_name} does not have",
                fix=f"axes: {', '.join(self._sizes)}",
            )
        if not shards(spec, shape, self._sizes):
            raise error_at(
                PassError,
                op,
                f"sharding {spec} does not split {value.type} into equal shards",
                why="devices run one program, so their shards have one shape",
                fix="shard dims that the axes' sizes divide, or pad the value",
            )

    def _block(self, operations: Sequence[ir.Operation], block: ir.Block) -> None:
        for op in operations:
            with ir.InsertionPoint(block), op.location:
                self._op(op)

    def _op(self, op: ir.Operation) -> None:
        if all(result in self._shards for result in op.results) and len(op.results):
            return  # a reduce-scatter has made it
        if op.name in (_RESHARD, _CONSTRAINT):
            target = spec_of(op.attributes["sharding"])
            self._check(op.results[0], target, op)
            self._shards[op.results[0]] = Shard(self._as(op.operands[0], target), target)
            return
        makes = [
            spec_or_replicated(sharding, value.type)
            for value, sharding in zip(op.results, value_shardings(self._function, op.results), strict=True)
        ]
        for value, spec in zip(op.results, makes, strict=True):
            self._check(value, spec, op)
        if op.name == "stablehlo.while":
            self._loop(op, makes)
        elif op.name in FORWARDING:
            self._forward(op, makes)
        elif op.name not in _WRITTEN_ANEW and all(spec.is_replicated for spec in (*makes, *self._specs_read(op))):
            self._whole(op)
            if op.name == "stablehlo.rng":
                self._drawn(op)
        else:
            self._sharded(op, makes)

    def _specs_read(self, op: ir.Operation) -> list[Spec]:
        inside = [value for _, _, value in nested_operands(op)]
        return [self._shards[value].spec for value in (*op.operands, *inside) if value in self._shards]

    def _as(self, value: ir.Value, spec: Spec) -> ir.Value:
        shard = self._shards[value]
        return self._resharder.reshard(shard.value, shard.spec, spec)

    def _whole(self, op: ir.Operation) -> None:
        """Every device does all of it."""
        made = op.clone().operation
        for number, value in enumerate(op.operands):
            made.operands[number] = self._shards[value].value
        self._read_inside(made)
        _drop_shardings(made)
        _drop_constraints(made)
        for old, new in zip(op.results, made.results, strict=True):
            self._shards[old] = Shard(new, Spec.replicated(_rank(new)))

    def _drawn(self, op: ir.Operation) -> None:
        """Let all devices have the numbers that the first one has drawn: each draws others."""
        index = self._collectives.devices.index(tuple(self._sizes))
        is_first = compared(index, "EQ", splat(index.type, 0))

        def own(bits: ir.Value) -> ir.Value:
            return chosen(is_first, bits, splat(bits.type, 0))

        def add_up(bits: ir.Value) -> ir.Value:
            return self._collectives.all_reduce(bits, tuple(self._sizes), "stablehlo.add")

        (result,) = op.results
        shard = self._shards[result]
        self._shards[result] = Shard(sum_of_bits(shard.value, own, add_up), shard.spec)

    def _read_inside(self, made: ir.Operation) -> None:
        """Let regions read shards."""
        for nested, number, value in list(nested_operands(made)):
            if value in self._shards:
                nested.operands[number] = self._shards[value].value

    def _forward(self, op: ir.Operation, makes: Sequence[Spec]) -> None:
        values = [self._as(value, spec) for value, spec in zip(op.operands, makes, strict=True)]
        made = op.clone().operation
        _drop_shardings(made)
        for number, (value, old, new, spec) in enumerate(zip(values, op.results, made.results, makes, strict=True)):
            made.operands[number] = value
            new.set_type(value.type)
            self._shards[old] = Shard(new, spec)

    def _loop(self, op: ir.Operation, makes: Sequence[Spec]) -> None:
        entering = [self._as(value, spec) for value, spec in zip(op.operands, makes, strict=True)]
        types = [value.type for value in entering]
        kept = {name: op.attributes[name] for name in op.attributes.keys() if name != SHARDING}  # noqa: SIM118 -- iterating gives no names in every jaxlib
        loop = ir.Operation.create(op.name, results=types, operands=entering, attributes=kept, regions=2)
        for old, new in zip(op.regions, loop.regions, strict=True):
            source = old.blocks[0]
            target = new.blocks.append(*types, arg_locs=[op.location] * len(types))
            for value, argument, spec in zip(source.arguments, target.arguments, makes, strict=True):
                self._shards[value] = Shard(argument, spec)
            operations = [view.operation for view in source.operations]
            end = operations.pop()
            self._block(operations, target)
            wanted = makes if old == op.regions[1] else [Spec()]
            with ir.InsertionPoint(target), end.location:
                returned = [self._as(value, spec) for value, spec in zip(end.operands, wanted, strict=True)]
                ir.Operation.create("stablehlo.return", operands=returned)
        for old, new, spec in zip(op.results, loop.results, makes, strict=True):
            self._shards[old] = Shard(new, spec)

    def _sharded(self, op: ir.Operation, makes: Sequence[Spec]) -> None:
        """The form of an op on shards."""
        form = FORMS.get(op.name)
        reads = [self._shards[value].spec for value in op.operands]
        rule = rule_of(op)
        if form is None or rule is None:
            raise self._error(op, reads, makes, f"there is no form of {op.name} on shards")
        count = len(rule.operands)
        bare = [Spec(spec.dims) for spec in (*reads[:count], *makes)]
        axes_of = factor_axes((*rule.operands, *rule.results), bare, rule.sizes, self._collectives.devices)
        whole = rule.replicated | rule.permuted
        if axes_of is None or any(axes_of.get(factor) for factor in whole):
            raise self._error(op, reads, makes, f"no form of {op.name} reads and makes these shardings")
        self._check_unreduced(op, reads, makes)
        parts = [self._collectives.devices.group_size(axes_of.get(rule.factor_of(halo), ())) for halo in rule.halos]
        if any(count > 1 and not halo.is_near(count) for halo, count in zip(rule.halos, parts, strict=True)):
            raise self._error(op, reads, makes, f"{op.name} reads rows of shards that are not next to a device's own")
        target = self._scatter_target(op)
        local = LocalOp(
            op,
            [self._shards[value].value for value in op.operands],
            reads,
            makes,
            rule,
            axes_of,
            self._collectives,
            self._read_inside,
            scatter_to=None if target is None else spec_of(target.attributes["sharding"]),
        )
        made = list(form.write(local))
        if local.scattered:
            assert target is not None and local.scatter_to is not None
            self._check(target.results[0], local.scatter_to, target)
            self._shards[target.results[0]] = self._shards[op.results[0]] = Shard(made[0], local.scatter_to)
            return
        for old, new, spec in zip(op.results, made, makes, strict=True):
            self._shards[old] = Shard(new, spec)

    def _scatter_target(self, op: ir.Operation) -> ir.Operation | None:
        """The reshard that is the only reader of an op's result."""
        if len(op.results) != 1:
            return None
        readers = [use.owner.operation for use in op.results[0].uses]
        return readers[0] if len(readers) == 1 and readers[0].name == _RESHARD else None

    def _check_unreduced(self, op: ir.Operation, reads: Sequence[Spec], makes: Sequence[Spec]) -> None:
        """Refuse what is not linear in partial sums: each device would have to know the others'."""
        unreduced = [spec.unreduced for spec in reads if spec.unreduced]
        if not unreduced:
            return
        linear = op.name in LINEAR or (op.name in SCALING and not reads[1].unreduced)
        if not linear or any(spec.unreduced != unreduced[0] for spec in makes):
            raise self._error(op, reads, makes, f"{op.name} reads an unreduced value, but is not linear in it")
        if op.name == "stablehlo.add" and len(unreduced) != len(reads):
            raise self._error(op, reads, makes, f"{op.name} adds an unreduced value to one that is not")

    def _error(self, op: ir.Operation, reads: Sequence[Spec], makes: Sequence[Spec], message: str) -> PassError:
        operands = "; ".join(str(spec) or "scalar" for spec in reads)
        results = "; ".join(str(spec) or "scalar" for spec in makes)
        return error_at(
            PassError,
            op,
            message,
            why=f"operands are sharded as ({operands}), results as ({results})",
            fix="reshard the operands to what the op's sharding rule says, or replicate them",
        )


def _erase_unread(manual: ir.Operation) -> None:
    """Whole values of which devices made smaller ones."""
    for op in reversed(nested_operations(manual)):
        if op.name in _EASILY_SMALLER and next(iter(op.results[0].uses), None) is None:
            op.erase()


def _drop_shardings(op: ir.Operation) -> None:
    for each in (op, *nested_operations(op)):
        if SHARDING in each.attributes:
            del each.attributes[SHARDING]


def _drop_constraints(op: ir.Operation) -> None:
    """In an op that every device does whole, nothing is sharded."""
    for nested in nested_operations(op):
        if nested.name == _CONSTRAINT:
            nested.results[0].replace_all_uses_with(nested.operands[0])
            nested.erase()


def _rank(value: ir.Value) -> int:
    return value.type.rank if isinstance(value.type, ir.RankedTensorType) else 0
