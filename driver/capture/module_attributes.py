"""Attributes that capture writes onto JAX's module, as ``docs/ir.md`` says under *captured*."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.driver.arrays.placed_arguments import PlacedArguments
from bactrian.driver.capture import gradient_boundary
from bactrian.driver.capture.argument_info import ArgumentInfo, ResultInfo
from bactrian.driver.capture.argument_shardings import Requested, write_requested
from bactrian.driver.source import Frame
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    NUM_STAGES,
    PINNED_STAGES,
    ROLE,
    UPDATES,
    argument_attributes,
    integer,
    result_attributes,
)
from bactrian.passes.ir.regions import body, custom_call_target, main_function

_NO_MESH = "#sdy.mesh<[]>"


def annotated(
    module: ir.Module,
    arguments: Sequence[ArgumentInfo],
    results: Sequence[ResultInfo],
    options: Mapping[str, int | str],
    requested: Sequence[tuple[int, Requested]],
    line: Frame | None,
) -> tuple[bytes, str]:
    """Bytecode of the module with our attributes, and the digest of its text without locations.

    ``@main`` gets the line where the user's function begins: errors about the whole step name it.
    """
    jax_bytecode = io.BytesIO()
    module.operation.write_bytecode(jax_bytecode)
    with make_context(), ir.Location.unknown():
        ours = ir.Module.parse(jax_bytecode.getvalue())
        for name, value in options.items():
            ours.operation.attributes[f"bactrian.{name}"] = (
                ir.StringAttr.get(value) if isinstance(value, str) else integer(value)
            )
        main = main_function(ours)
        block = body(main)
        if line is not None:
            begin = ir.Location.file(line.file, line.line, 1)
            main.location = ir.Location.name(line.function, childLoc=begin)
        if len(block.arguments) != len(arguments):
            raise ConfigError(
                f"JAX lowered {len(arguments)} arguments to {len(block.arguments)}",
                fix="switch jax_use_simplified_jaxpr_constants off",
            )
        argument_attrs = argument_attributes(main)
        for info, attrs, argument in zip(arguments, argument_attrs, block.arguments, strict=True):
            attrs[ROLE] = ir.StringAttr.get(info.role)
            argument.set_location(ir.Location.name(info.path))
        write_requested(ours, requested, [len(info.physical.shape) for info in arguments], argument_attrs)
        result_attrs = result_attributes(main)
        for info, attrs in zip(results, result_attrs, strict=True):
            attrs["jax.result_info"] = ir.StringAttr.get(info.path)
            if info.updates is not None:
                attrs[UPDATES] = integer(info.updates)
        for name, dicts in (("arg_attrs", argument_attrs), ("res_attrs", result_attrs)):
            if dicts:
                main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(d) for d in dicts])
        _drop_noise(ours, block)
        text = str(ours.operation.get_asm(enable_debug_info=False))
        bytecode = io.BytesIO()
        ours.operation.write_bytecode(bytecode)
    return bytecode.getvalue(), hashlib.sha256(text.encode()).hexdigest()


def write_placed(module: ir.Module, placed: PlacedArguments) -> None:
    """Say on the arguments of `@main` which stages have them already."""
    main = main_function(module)
    arguments = argument_attributes(main)
    for number, stages in placed.stages:
        arguments[number][PINNED_STAGES] = ir.ArrayAttr.get([integer(stage) for stage in stages])
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(attrs) for attrs in arguments])
    module.operation.attributes[NUM_STAGES] = integer(placed.num_stages)


def _drop_noise(module: ir.Module, main: ir.Block) -> None:
    """Removes what nothing reads of our own calls, and JAX's constraints of keys to no mesh at all."""
    _erase_calls(module, gradient_boundary.DIFFERENTIATED)
    index = next(op for op in main.operations if custom_call_target(op.operation) == gradient_boundary.MICROBATCH_INDEX)
    if not any(True for _ in index.results[0].uses):
        index.erase()
    meshes = [op for op in module.body.operations if op.name == "sdy.mesh" and str(op.attributes["mesh"]) == _NO_MESH]
    if not meshes:
        return
    prefixes = tuple(f"#sdy.sharding<@{ir.StringAttr(op.attributes['sym_name']).value}," for op in meshes)
    for op in _found(module, sdy.ShardingConstraintOp):
        if not str(op.attributes["sharding"]).startswith(prefixes):
            continue
        op.results[0].replace_all_uses_with(op.operands[0])
        op.erase()
    text = str(module.operation.get_asm(enable_debug_info=False, large_elements_limit=0))
    for op, prefix in zip(meshes, prefixes, strict=True):
        if text.count(prefix.removeprefix("#sdy.sharding<").removesuffix(",")) == 1:
            op.erase()


def _erase_calls(module: ir.Module, target: str) -> None:
    for op in _found(module, stablehlo.CustomCallOp):
        if custom_call_target(op) == target:
            op.erase()


def _found(module: ir.Module, kind: type[ir.OpView]) -> list[ir.Operation]:
    """All ops of a kind, wherever they are."""
    found: list[ir.Operation] = []

    def visit(op: Any) -> ir.WalkResult:
        found.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit, ir.WalkOrder.PRE_ORDER, kind)
    return found
