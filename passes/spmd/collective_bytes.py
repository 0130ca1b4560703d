"""What a partitioned module sends, counted from its collectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.op_costs import tensor_size, trip_count
from bactrian.passes.spmd.collectives import COLLECTIVES


@dataclass(frozen=True)
class Collective:
    """One collective of a module.

    Attributes:
        kind: StableHLO's name of it, as ``all_gather``.
        group: devices that take part together; of a permute those that send or receive.
        nbytes: what each of them sends when the function runs once, in all turns of the loops around it.
        times: how often it runs then; None where the IR does not say: in a loop without a known trip count, or a branch.
        where: location of the op.
    """

    kind: str
    group: int
    nbytes: float
    times: int | None
    where: str


def count_collectives(root: ir.Operation) -> list[Collective]:
    """The collectives inside of an op, in order. In a loop of unknown length one turn counts, of a branch each.

    For n devices, and B bytes that each holds before: all-gather (n - 1) B, all-reduce 2 (n - 1) / n B, reduce-scatter
    and all-to-all (n - 1) / n B, permute B (Thakur, Rabenseifner and Gropp, 2005).

    Args:
        root: a function, or a module.

    Raises:
        PassError: a collective does not say who takes part.
    """
    return list(_inside(root, 1))


def sent_bytes(collectives: list[Collective]) -> dict[str, float]:
    """Bytes that each device sends, by kind."""
    sent = dict[str, float]()
    for collective in collectives:
        if collective.nbytes:
            sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.nbytes
    return sent


def _inside(root: ir.Operation, times: int | None) -> Iterator[Collective]:
    for region in root.regions:
        for block in region.blocks:
            for view in block.operations:
                op = view.operation
                if op.name in COLLECTIVES:
                    yield _collective(op, times)
                elif len(op.regions):
                    yield from _inside(op, _times_inside(op, times))


def _times_inside(op: ir.Operation, times: int | None) -> int | None:
    if op.name == "stablehlo.while":
        turns = trip_count(op)
        return None if turns is None or times is None else times * turns
    return None if op.name in ("stablehlo.case", "stablehlo.if") else times


def _collective(op: ir.Operation, times: int | None) -> Collective:
    kind, held = op.name.removeprefix("stablehlo."), tensor_size(op.operands[0].type).bytes
    if kind == "collective_permute":
        pairs = np.array(ir.DenseElementsAttr(op.attributes["source_target_pairs"]))
        group, share = np.unique(pairs).size, float(any(source != target for source, target in pairs))
    else:
        group = np.array(ir.DenseElementsAttr(op.attributes["replica_groups"])).shape[1]
        if group == 0:
            raise error_at(
                PassError,
                op,
                f"cannot count what {op.name} sends: replica_groups is empty",
                why="then all devices take part, and the module does not say how many there are",
                fix="write the groups",
            )
        share = {"all_gather": group - 1.0, "all_reduce": 2 * (group - 1) / group}.get(kind, (group - 1) / group)
    return Collective(kind, group, (1 if times is None else times) * share * held, times, str(op.location))
