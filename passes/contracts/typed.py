"""The contract of types: values are tensors whose size is known."""

from __future__ import annotations

import math

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.meshes import is_mesh_tensor, mesh_tensor_parts
from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes

MAX_BYTES = 1 << 48
_ELEMENTS = "integers, floats or complex numbers"


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section "Attributes and types"."""
    sound = set[ir.Type]()
    for each in view.module.body.operations:
        function = each.operation
        if function.name != "func.func":
            continue
        ops = nested_operations(function)
        for block in {op.block: None for op in ops}:
            for value in block.arguments:
                _verify_type(value.type, value, sound)
        for op in ops:
            for value in op.results:
                _verify_type(value.type, op, sound)


def _verify_type(type_: ir.Type, where: ir.Operation | ir.Value, sound: set[ir.Type]) -> None:
    if type_ in sound:
        return
    tensor = mesh_tensor_parts(type_)[1] if is_mesh_tensor(type_) else type_
    if not isinstance(tensor, (ir.RankedTensorType, stablehlo.TokenType)):
        raise error_at(PassError, where, f"a value is {type_}, must be a tensor of known shape")
    if isinstance(tensor, ir.RankedTensorType):
        if not tensor.has_static_shape:
            raise error_at(PassError, where, f"the shape of {type_} is dynamic, must be static")
        element = tensor.element_type
        inner = element.element_type if isinstance(element, ir.ComplexType) else element
        if not isinstance(inner, (ir.IntegerType, ir.FloatType)):
            raise error_at(PassError, where, f"the elements of {type_} are {element}, must be {_ELEMENTS}")
        if type_bytes(tensor) > MAX_BYTES:
            raise error_at(
                PassError, where, f"{type_} has {math.prod(tensor.shape):,} elements, must have at most 2^48 bytes"
            )
    sound.add(type_)
