"""The contract of adopted shardings: what users asked for is over one mesh, and only on arguments and constraints."""

from __future__ import annotations

import re

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, mesh_axes, mesh_name
from bactrian.passes.ir.regions import body, custom_call_target, terminator

_STAGE = re.compile(r"stage\d+")


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 1a."""
    main = view.main
    for name in mesh_axes(view.module):
        if name != USER_MESH and not _STAGE.fullmatch(name):
            raise error_at(PassError, view.root, f"a mesh of the user's is left: @{name}")
    for value, entry in zip(body(main).arguments, argument_attributes(main), strict=True):
        if SHARDING not in entry:
            continue
        _verify_mesh(entry[SHARDING], value)
        dims = sdy.TensorShardingAttr(entry[SHARDING]).dimension_shardings
        if not all(sdy.DimensionShardingAttr(dim).is_closed for dim in dims):
            raise error_at(PassError, value, f"sharding {entry[SHARDING]} of an argument leaves a dim open")
    for value, entry in zip(terminator(main).operands, result_attributes(main), strict=True):
        if SHARDING in entry:
            raise error_at(PassError, value, f"a result has {SHARDING}; its value must have a constraint instead")
    for op in view.ops:
        if op.name == "sdy.sharding_constraint":
            _verify_mesh(op.attributes["sharding"], op)
        elif op.name == "sdy.manual_computation" or custom_call_target(op) == "Sharding":
            raise error_at(PassError, op, "a sharding is asked for by no sdy.sharding_constraint")


def _verify_mesh(sharding: ir.Attribute, where: ir.Operation | ir.Value) -> None:
    if mesh_name(sharding) != USER_MESH:
        raise error_at(PassError, where, f"sharding {sharding} is not over @{USER_MESH}")
