"""The one maker of MLIR contexts: every dialect that jaxlib ships, and no jax import."""

from __future__ import annotations

import functools

from jaxlib.mlir import ir
from jaxlib.mlir._mlir_libs import _jax_mlir_ext
from jaxlib.mlir.dialects import chlo, mhlo, mpmd, sdy, stablehlo


@functools.cache
def _register_passes() -> None:
    """Register StableHLO's passes with MLIR, once per process."""
    stablehlo.register_stablehlo_passes()


@functools.cache
def _registry() -> ir.DialectRegistry:
    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    return registry


def make_context() -> ir.Context:
    """Make a context with every dialect (stablehlo, chlo, sdy, mpmd, func, ...) loaded.

    Returns:
        A context that is not entered; use it as ``with make_context(): ...``.
    """
    context = ir.Context()
    context.append_dialect_registry(_registry())
    for dialect in (sdy, mpmd, chlo, stablehlo):
        dialect.register_dialect(context)
    mhlo.register_mhlo_dialect(context)
    context.load_all_available_dialects()
    _register_passes()
    return context
