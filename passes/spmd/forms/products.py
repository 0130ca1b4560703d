"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.spmd.local_op import LocalOp


def product(local: LocalOp) -> Sequence[ir.Value]:
    """A product of shards; over a contracting dim that is sharded, partial sums are added up."""
    (made,) = local.clone()
    return [local.add_up(made)]
