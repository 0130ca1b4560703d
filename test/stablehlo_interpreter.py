"""StableHLO's own interpreter, which is the definition of what an op does: the second judge, beside XLA on one device."""

from __future__ import annotations

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from op_cases import COMPLEX, Array, Case

from bactrian.passes.frame.context import make_context
from bactrian.passes.ir.regions import body, main_function

_WITHOUT_NUMPY = {*COMPLEX, "bf16", "f16"}  # the bindings don't read constants of these
_ENDS_THE_PROCESS = {
    "batch_norm_grad", "batch_norm_inference", "batch_norm_training", "broadcast", "cholesky", "convolution", "dot",
    "fft", "rng_bit_generator", "torch_index_select", "triangular_solve",
}  # fmt: skip
_DIFFERS = {
    "compare": "it has no total order",
    "scatter": "it writes the part of a window that is inside, where XLA, and JAX with it, leaves out the window",
}


def is_interpreted(case: Case) -> bool:
    """Whether `interpreted` runs a case, and has to give what XLA gives."""
    types = [*case.reads, *case.results]
    return (
        case.name not in {*_ENDS_THE_PROCESS, *_DIFFERS}
        and not any(each.element in _WITHOUT_NUMPY for each in types)
        and all(0 not in each.shape for each in types)
    )


def interpreted(case: Case) -> list[Array]:
    """What StableHLO's interpreter makes of a case."""
    with make_context() as context:
        stablehlo.register_interpreter_dialect(context)
        module = ir.Module.parse(case.module())
        arguments = body(main_function(module)).arguments
        read = [_constant(value, argument.type) for value, argument in zip(case.operands, arguments, strict=True)]
        made = stablehlo.eval_module(module, read)
        return [np.array(each).reshape(type_.shape) for each, type_ in zip(made, case.results, strict=True)]


def _constant(value: Array, type_: ir.Type) -> ir.Attribute:
    if value.dtype == np.bool_:
        return ir.DenseElementsAttr.get([ir.BoolAttr.get(bool(flag)) for flag in value.ravel()], type_)
    element = ir.RankedTensorType(type_).element_type
    return ir.DenseElementsAttr.get(np.ascontiguousarray(value), type=element, shape=value.shape)
