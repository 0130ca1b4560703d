"""Nodes for what devices send each other."""

from __future__ import annotations

import math

from jaxlib.mlir import ir

from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.peak.value_graph import Graph, Kind


def collective_node(graph: Graph, op: ir.Operation, read: int) -> int:
    """Add a collective to the graph of one device.

    Args:
        graph: gets the nodes.
        op: one of StableHLO's collectives.
        read: the node of its operand.
    """
    type_ = ir.RankedTensorType(op.results[0].type)
    shape, nbytes, kind = tuple(type_.shape), type_bytes(type_), op.name.rpartition(".")[2]
    if kind == "all_reduce":  # XLA makes one of several
        group = kind, str(op.attributes["replica_groups"]), str(type_.element_type), _fold(op)
        return graph.add(kind, Kind.FIRM, (read,), shape, nbytes, group=group, key=group)
    if kind == "all_gather":
        return _along(graph, op, read, "all_gather_dim", shape, nbytes)
    if kind == "reduce_scatter":
        return _along(graph, op, read, "scatter_dimension", shape, nbytes)
    key = str(op.attributes["replica_groups" if kind == "all_to_all" else "source_target_pairs"])
    if kind == "all_to_all":  # shards are sliced, sent, and put together
        read = graph.add("pieces", Kind.LOOSE, (read,), (math.prod(shape),), nbytes, key=key)
        read = graph.add(kind, Kind.FIRM, (read,), shape, nbytes, key=key)
        return graph.add("regroup", Kind.LOOSE, (read,), shape, nbytes, key=key)
    return graph.add(kind, Kind.FIRM, (read,), shape, nbytes, key=key)


def _along(graph: Graph, op: ir.Operation, read: int, name: str, shape: tuple[int, ...], nbytes: int) -> int:
    """A collective along a dim, which has to be the major one in memory."""
    dim, kind = ir.IntegerAttr(op.attributes[name]).value, op.name.rpartition(".")[2]
    order = [dim, *(each for each in graph.order(read) if each != dim)]
    read = graph.transpose(read, order)
    key = str(op.attributes["replica_groups"])
    read = graph.add(kind, Kind.FIRM, (read,), [shape[each] for each in order], nbytes, key=key)
    return graph.transpose(read, [order.index(each) for each in range(len(shape))])


def _fold(op: ir.Operation) -> str:
    return op.regions[0].blocks[0].operations[0].operation.name
