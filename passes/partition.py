"""``partition``: from stage functions with shardings to the program of one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.meshes import SHARDING, mesh_axes
from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.machine.spec import MeshAxes, num_devices
from bactrian.passes.spmd.collectives import COLLECTIVES
from bactrian.passes.spmd.function_partitioner import partition_function
from bactrian.passes.spmd.op_rules import annotate_rules, drop_rules


@dataclass(frozen=True)
class Partition(Pass):
    """Write each stage function as one device runs it: with the shapes of shards, and a collective for each reshard.

    Every op becomes the same op on shards, or what its kind needs beside that: a sum over a sharded dim is added up over
    devices, an iota along one begins at the device's own row, windows at the edge of a shard read rows of its neighbours.
    An op that can't be done on shards is done whole by every device; ``solve-shardings`` offers nothing else for it. So the
    collectives of the module are those that run: XLA gets the program of one device, and partitions nothing.

    The signature of a function stays that of whole values; its body is one ``sdy.manual_computation`` over all axes of the
    mesh, as ``shard_map`` writes it. A function on a mesh of one device, beside stages of several, loses its shardings.

    Requires: the staged form (``split-stages``), with ``sdy.sharding`` on all values of functions of several devices.
    Ensures: no sharding and no reshard inside of functions; none on the signature of those of one device.

    Input:

    ```mlir
    module {
      sdy.mesh @stage0 = <["data"=4]>
      func.func private @stage0.forward(%x: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %w: tensor<16x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) attributes {mesh_shape = #sdy.mesh<["data"=4]>} {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x4xf32>
        %z = sdy.reshard %y <@stage0, [{"data"}, {}]> : tensor<8x4xf32>
        return %z : tensor<8x4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module {
      sdy.mesh @stage0 = <["data"=4]>
      func.func private @stage0.forward(%arg0: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %arg1: tensor<16x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) attributes {mesh_shape = #sdy.mesh<["data"=4]>} {
        %0 = sdy.manual_computation(%arg0, %arg1) in_shardings=[<@stage0, [{}, {"data"}]>, <@stage0, [{"data"}, {}]>] out_shardings=[<@stage0, [{"data"}, {}]>] manual_axes={"data"} (%arg2: tensor<8x4xf32>, %arg3: tensor<4x4xf32>) {
          %1 = stablehlo.dot_general %arg2, %arg3, contracting_dims = [1] x [0] : (tensor<8x4xf32>, tensor<4x4xf32>) -> tensor<8x4xf32>
          %2 = "stablehlo.reduce_scatter"(%1) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>, scatter_dimension = 0 : i64, use_global_device_ids}> ({
          ^bb0(%arg4: tensor<f32>, %arg5: tensor<f32>):
            %3 = stablehlo.add %arg4, %arg5 : tensor<f32>
            stablehlo.return %3 : tensor<f32>
          }) : (tensor<8x4xf32>) -> tensor<2x4xf32>
          sdy.return %2 : tensor<2x4xf32>
        } : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x4xf32>
        return %0 : tensor<8x4xf32>
      }
    }
    ```

    The product sums over a sharded dim, and its only reader wants a shard of the sum: a reduce-scatter.
    """

    name: ClassVar[str] = "partition"
    summary: ClassVar[str] = "write the program of one device, with its collectives"
    requires: ClassVar[tuple[str, ...]] = ("formed", "typed")
    ensures: ClassVar[tuple[str, ...]] = ("split", "partitioned")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("functions", "that are partitioned"),
        Statistic("collectives", "that they have"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Partition every stage function whose mesh has several devices."""
        functions = _stage_functions(module)
        if all(num_devices(axes) == 1 for _, _, axes in functions):
            return  # nothing was sharded
        annotate_rules(module)
        for function, mesh, axes in functions:
            if num_devices(axes) == 1:
                _drop_shardings(function)
                continue
            partition_function(function, mesh, axes)
            ctx.count("functions")
            ctx.count("collectives", sum(op.name in COLLECTIVES for op in nested_operations(function)))
        drop_rules(module.operation)


def _stage_functions(module: ir.Module) -> list[tuple[ir.Operation, str, MeshAxes]]:
    """The functions of stages, with the symbol and the axes of their meshes."""
    meshes, found = mesh_axes(module), list[tuple[ir.Operation, str, MeshAxes]]()
    for view in module.body.operations:
        op = view.operation
        if op.name == "func.func":
            mesh = ir.StringAttr(op.attributes["sym_name"]).value.partition(".")[0]
            if mesh in meshes:
                found.append((op, mesh, meshes[mesh]))
    return found


def _drop_shardings(function: ir.Operation) -> None:
    """Make a function of one device one without shardings: a reshard there is the value itself."""
    for op in nested_operations(function):
        if op.name in ("sdy.reshard", "sdy.sharding_constraint"):
            op.results[0].replace_all_uses_with(op.operands[0])
            op.erase()
        elif SHARDING in op.attributes:
            del op.attributes[SHARDING]
    for name, entries in (("arg_attrs", argument_attributes(function)), ("res_attrs", result_attributes(function))):
        if name in function.attributes:
            kept = [{key: value for key, value in entry.items() if key != SHARDING} for entry in entries]
            function.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in kept])
