"""Programs over a mesh of virtual devices: read, solve or choose at random, write, compile, run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir

from bactrian.driver.xla.compile_stage import compile_functions, signature_shardings
from bactrian.passes import pipelines
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import GRADIENT_BOUNDARY
from bactrian.passes.ir.regions import body, custom_call_target, main_function
from bactrian.passes.machine.cluster import CPU_HOST
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.sharding.loop_dataflow import capture_unchanged
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.work_from_ir import Reading, read_program
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes
from bactrian.passes.spmd.function_partitioner import partition_function
from bactrian.passes.spmd.op_rules import annotate_rules


def lowered(function: Callable[..., Any], arguments: Sequence[Any], axes: MeshAxes) -> ir.Module:
    """A jax function as a flat module with a mesh and rules."""
    text = jax.jit(function, keep_unused=True).lower(*arguments).as_text()
    return prepared(text, axes)


def prepared(text: str, axes: MeshAxes, *, is_step: bool = False) -> ir.Module:
    """A module's text with a mesh and rules; the mesh that is there is replaced. In a step no ops are merged: each
    accumulator begins with a zero of its own."""
    with make_context():
        module = ir.Module.parse(text)
        for view in list(module.body.operations):
            if view.operation.name == "sdy.mesh":
                view.operation.erase()
        sizes = ", ".join(f'"{name}"={size}' for name, size in axes)
        mesh = ir.Module.parse(f"sdy.mesh @stage0 = <[{sizes}]>").body.operations[0].operation
        clone = mesh.clone(ip=ir.InsertionPoint.at_block_begin(module.body))
        assert clone.operation.name == "sdy.mesh"
    run_pipeline(module, pipelines.prepare_shardings() if is_step else pipelines.prepare_function())
    return module


def read(module: ir.Module, axes: MeshAxes, hosts: HostGroup = CPU_HOST) -> tuple[Reading, ShardingModel]:
    """What the model sees of a module."""
    mesh = hosts.mesh(axes)
    with module.context:
        capture_unchanged(main_function(module))
        reading = read_program(main_function(module), mesh, hosts, 1, lambda op, text: None)
    return reading, ShardingModel(reading.problem, mesh)


def write(module: ir.Module, reading: Reading, model: ShardingModel, choice: Sequence[int]) -> None:
    """Write a choice of the model's network into the module."""
    with module.context, ir.Location.unknown():
        write_stages([Writer(main_function(module), reading, model, model.shardings(choice), "stage0")])


def partitioned(module: ir.Module, axes: MeshAxes) -> ir.Module:
    """A copy of a sharded module with the program of one device: no attribute of ours, no boundary."""
    with module.context, ir.Location.unknown():
        clone = ir.Module.parse(str(module.operation.get_asm()))
        main = main_function(clone)
        for view in list(body(main).operations):
            op = view.operation
            if custom_call_target(op) == GRADIENT_BOUNDARY:
                for result, operand in zip(list(op.results), list(op.operands), strict=True):
                    result.replace_all_uses_with(operand)
                op.erase()
        count = int(np.prod([size for _, size in axes]))
        if count > 1:
            annotate_rules(clone)
            partition_function(main, "stage0", axes)
        number = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), count)
        clone.operation.attributes["mhlo.num_partitions"] = number
        clone.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(number.type, 1)
        clone.operation.attributes["sym_name"] = ir.StringAttr.get("program")
        for name in ("arg_attrs", "res_attrs"):
            if name in main.attributes:
                kept = [
                    ir.DictAttr.get({"sdy.sharding": ir.DictAttr(entry)["sdy.sharding"]})
                    for entry in ir.ArrayAttr(main.attributes[name])
                ]
                main.attributes[name] = ir.ArrayAttr.get(kept)
        return clone


def counted_bytes(module: ir.Module, axes: MeshAxes) -> dict[str, float]:
    """What the collectives of the program of one device send, by kind."""
    return sent_bytes(count_collectives(partitioned(module, axes).operation))


def run(module: ir.Module, axes: MeshAxes, arguments: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Run a sharded module on virtual devices; whole results."""
    devices = jax.devices()[: int(np.prod([size for _, size in axes]))]
    text = str(partitioned(module, axes))
    function = compile_functions({"main": text}, {"main": devices})["main"]
    shardings, _ = signature_shardings(text, devices)
    placed = [jax.device_put(x, s) for x, s in zip(arguments, shardings, strict=True)]
    return [np.asarray(x) for x in function(placed)]
