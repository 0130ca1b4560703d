"""The contract of chosen shardings: every value has one, on the mesh of its stage."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    NUM_STAGES,
    SHARDING_ESTIMATES,
    argument_attributes,
    integer_attribute,
    result_attributes,
    result_updates,
    stage_of,
)
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, mesh_axes, mesh_name, stage_axes
from bactrian.passes.ir.regions import body, custom_call_target, terminator
from bactrian.passes.machine.spec import MeshAxes, num_devices

_SINGLE = ("sdy.reshard", "sdy.sharding_constraint")  # ops whose sharding stands in an attribute of their own


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 7a; nothing where every stage has one device, but that rules are gone."""
    main = view.main
    for op in view.ops:
        if "sdy.sharding_rule" in op.attributes:
            raise error_at(PassError, op, "sdy.sharding_rule is left")
    stages = integer_attribute(view.root, NUM_STAGES) or 1
    if all(num_devices(axes) == 1 for axes in stage_axes(view.module, stages)):
        return
    figures = view.root.attributes.get(SHARDING_ESTIMATES)
    if not isinstance(figures, ir.ArrayAttr) or len(figures) != stages:
        raise error_at(PassError, view.root, f"bactrian.sharding has not one entry for each of {stages} stages")
    meshes = mesh_axes(view.module)
    if USER_MESH in meshes:
        raise error_at(PassError, view.root, f"the mesh @{USER_MESH} is left")
    checker = _Checker(meshes)
    _verify_signature(main, checker)
    for each in body(main).operations:
        op = each.operation
        if op == terminator(main) or (custom_call_target(op) == GRADIENT_BOUNDARY and stages > 1):
            continue  # several stages' values pass the boundary, over several meshes
        for sharding in _shardings(op):
            checker.check(sharding, op)
            stage, name = stage_of(op), sdy.TensorShardingAttr(sharding).mesh_or_ref
            if stage is not None and name != ir.FlatSymbolRefAttr.get(f"stage{stage}"):
                raise error_at(PassError, op, f"an op of stage {stage} has a sharding over {name}")


def _shardings(op: ir.Operation) -> list[ir.Attribute]:
    """The shardings of an op's results."""
    if op.name in _SINGLE:
        return [op.attributes["sharding"]]
    found = list(sdy.TensorShardingPerValueAttr(op.attributes[SHARDING]).shardings) if SHARDING in op.attributes else []
    if len(found) != len(op.results):
        raise error_at(PassError, op, f"{len(found)} shardings for {len(op.results)} results")
    return found


def _verify_signature(main: ir.Operation, checker: _Checker) -> None:
    arguments, results = argument_attributes(main), result_attributes(main)
    ends = list(terminator(main).operands)
    for values, entries in ((list(body(main).arguments), arguments), (ends, results)):
        for value, entry in zip(values, entries, strict=True):
            if SHARDING not in entry:
                if isinstance(value.owner, ir.Block) and all(use.owner.name == "func.return" for use in value.uses):
                    continue  # an argument that no op reads is on no stage, nor is a result that is one
                raise error_at(PassError, value, f"an argument or a result of @main has no {SHARDING}")
            checker.check(entry[SHARDING], value)
    for value, entry, argument in zip(ends, results, result_updates(main), strict=True):
        if argument is None or SHARDING not in arguments[argument] or SHARDING not in entry:
            continue  # no op reads the argument
        before = arguments[argument][SHARDING]  # over the mesh of the first stage that reads it
        if mesh_name(entry[SHARDING]) == mesh_name(before) and entry[SHARDING] != before:
            raise error_at(
                PassError, value, f"the next value of argument {argument} is sharded otherwise than the argument"
            )


def _dims(sharding: ir.Attribute) -> list[ir.Attribute]:
    return list(sdy.TensorShardingAttr(sharding).dimension_shardings)


class _Checker:
    """Checks single shardings; each attribute once."""

    def __init__(self, meshes: dict[str, MeshAxes]) -> None:
        self._axes = {name: {axis for axis, _ in axes} for name, axes in meshes.items()}
        self._sound = set[ir.Attribute]()

    def check(self, sharding: ir.Attribute, where: ir.Operation | ir.Value) -> None:
        """Refuse a sharding that is open, or is not over whole axes of a mesh of the module."""
        if sharding in self._sound:
            return
        name = ir.FlatSymbolRefAttr(sdy.TensorShardingAttr(sharding).mesh_or_ref).value
        for attribute in _dims(sharding):
            dim = sdy.DimensionShardingAttr(attribute)
            if not dim.is_closed:
                raise error_at(PassError, where, f"sharding {sharding} leaves a dim open")
            for reference in dim.axes:
                axis = sdy.AxisRefAttr(reference)
                if axis.sub_axis_info is not None or axis.name not in self._axes[name]:
                    raise error_at(PassError, where, f"sharding {sharding} is not over whole axes of @{name}")
        self._sound.add(sharding)
