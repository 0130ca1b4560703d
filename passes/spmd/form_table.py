"""Which op has which form: the one table of what a device can do on shards. Every op that is not here is done whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.ir.op_traits import ELEMENTWISE
from bactrian.passes.spmd.forms.convolutions import convolution, convolution_rule
from bactrian.passes.spmd.forms.dynamic_slices import (
    dynamic_slice,
    dynamic_update_slice,
    narrow_dynamic_slice,
    narrow_dynamic_update_slice,
)
from bactrian.passes.spmd.forms.elementwise import narrow_reshape, same_op
from bactrian.passes.spmd.forms.indexing import gather, narrow_gather, narrow_scatter, scatter
from bactrian.passes.spmd.forms.linear_algebra import narrow_cholesky, narrow_fft, narrow_triangular_solve
from bactrian.passes.spmd.forms.products import product
from bactrian.passes.spmd.forms.rows import concatenation_rule, reversal, reversal_rule
from bactrian.passes.spmd.forms.shard_reductions import narrow_reduction, reduction
from bactrian.passes.spmd.forms.sources import constant, iota
from bactrian.passes.spmd.forms.windows import (
    pad,
    rows_rule,
    scatter_rule,
    slice_of_rows,
    windowed_reduction,
    windowed_reduction_rule,
)
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule


def _as_it_is(op: ir.Operation, rule: Rule) -> Rule:
    return rule


@dataclass(frozen=True)
class Form:
    """How an op is done on shards.

    Attributes:
        write: writes the op for one device; returns its results.
        narrow: of Shardy's rule for an op what `write` can do: factors that it can't shard are replicated. Dims with windows
            get their halos here.
    """

    write: Callable[[LocalOp], Sequence[ir.Value]]
    narrow: Callable[[ir.Operation, Rule], Rule] = _as_it_is


def _named(names: str, form: Form) -> dict[str, Form]:
    return {f"stablehlo.{name}": form for name in names.split()}


FORMS: dict[str, Form] = {
    **dict.fromkeys(ELEMENTWISE, Form(same_op)),
    **_named("sort", Form(same_op)),
    **_named("cholesky", Form(same_op, narrow_cholesky)),
    **_named("fft", Form(same_op, narrow_fft)),
    **_named("triangular_solve", Form(same_op, narrow_triangular_solve)),
    **_named("gather", Form(gather, narrow_gather)),
    **_named("scatter", Form(scatter, narrow_scatter)),
    **_named("dynamic_slice", Form(dynamic_slice, narrow_dynamic_slice)),
    **_named("dynamic_update_slice", Form(dynamic_update_slice, narrow_dynamic_update_slice)),
    **_named("concatenate", Form(same_op, concatenation_rule)),
    **_named("broadcast_in_dim map reduce_precision transpose", Form(same_op)),
    **_named("bitcast_convert reshape", Form(same_op, narrow_reshape)),
    **_named("constant", Form(constant)),
    **_named("convolution", Form(convolution, convolution_rule)),
    **_named("dot dot_general", Form(product)),
    **_named("iota", Form(iota)),
    **_named("pad", Form(pad, rows_rule)),
    **_named("reduce", Form(reduction, narrow_reduction)),
    **_named("reduce_window", Form(windowed_reduction, windowed_reduction_rule)),
    **_named("reverse", Form(reversal, reversal_rule)),
    **_named("select_and_scatter", Form(same_op, scatter_rule)),
    **_named("slice", Form(slice_of_rows, rows_rule)),
}
