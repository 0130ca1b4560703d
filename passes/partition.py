"""``partition``: from a stage's functions with shardings to the program of one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.meshes import mesh_axes
from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.machine.spec import MeshAxes, num_devices
from bactrian.passes.spmd.collectives import COLLECTIVES
from bactrian.passes.spmd.function_partitioner import partition_function
from bactrian.passes.spmd.op_rules import annotate_rules, drop_rules


@dataclass(frozen=True)
class Partition(Pass):
    """Write the program of one device of each stage: local shapes, and collectives where shardings change."""

    name: ClassVar[str] = "partition"
    summary: ClassVar[str] = "write the program of one device, with its collectives"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("functions", "that are partitioned"),
        Statistic("collectives", "that they have"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Partition every stage function whose mesh has several devices."""
        functions = stage_functions(module)
        if not functions:
            return
        annotate_rules(module)
        for function, mesh, axes in functions:
            partition_function(function, mesh, axes)
            ctx.count("functions")
            ctx.count("collectives", sum(op.name in COLLECTIVES for op in nested_operations(function)))
        drop_rules(module.operation)


def stage_functions(module: ir.Module) -> list[tuple[ir.Operation, str, MeshAxes]]:
    """The functions of stages of several devices, with the symbol and the axes of their meshes."""
    meshes, found = mesh_axes(module), list[tuple[ir.Operation, str, MeshAxes]]()
    for view in module.body.operations:
        op = view.operation
        if op.name == "func.func":
            mesh = ir.StringAttr(op.attributes["sym_name"]).value.partition(".")[0]
            if num_devices(meshes.get(mesh, ())) > 1:
                found.append((op, mesh, meshes[mesh]))
    return found
