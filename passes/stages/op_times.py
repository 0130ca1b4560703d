"""How long each op of ``@main`` takes on one device, before anything is placed or sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster_file import cluster_or_cores
from bactrian.passes.sharding.fusion_costs import (
    accumulating_scatters,
    is_separate,
    op_seconds,
    read_from_memory,
    remark_missing_rates,
    repack_seconds,
)
from bactrian.passes.sharding.loop_dataflow import OP, LoopFlow
from bactrian.passes.sharding.operations_from_ir import forwarded_values, forwards


@dataclass(frozen=True)
class OpTimes:
    """Predicted seconds of one run of each op of ``@main``, in order, on one device of a cluster.

    They are those of the choice of shardings: the roofline of an op, where elementwise ops are fused into what reads them
    and pay only for what they bring to and from memory; the body of a loop counts as often as it runs.
    """

    cluster: str
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, module: ir.Module, cluster: str, remark: Callable[[ir.Operation, str], None]) -> OpTimes:
        """Predict, for the devices of a cluster file, or for the cores of this host.

        Where the cluster has several kinds of hosts, the devices are those of the first kind on its line.

        Args:
            module: the program.
            cluster: the file, "" for the cores of this host.
            remark: told of element types that the devices have no rate for.
        """
        main, device, model = main_function(module), cluster_or_cores(cluster).groups[0].device, CostModel()
        flow = LoopFlow.of(main)
        remark_missing_rates(flow.ops, device, remark)
        value_of = forwarded_values(flow)
        from_memory, in_place = read_from_memory(flow, value_of), accumulating_scatters(flow)
        seconds: dict[ir.Operation, float] = {}
        for index, (op, top) in enumerate(zip(flow.ops, flow.tops, strict=True)):
            taken = seconds.setdefault(top, 0.0)
            if flow.kinds[index] != OP or forwards(flow, index) or not flow.results[index]:
                continue
            separate = is_separate(flow, index)
            keeps = separate or any(from_memory[value] for value in flow.results[index])
            operands = tuple(value_of[value] for value in flow.operands[index][: len(op.operands)])
            once = op_seconds(op, model, device, keeps, separate, from_memory, operands, in_place=index in in_place)
            if per_byte := repack_seconds(op, device):
                once += per_byte * sum(model.size(value.type).bytes for value in op.operands)
            seconds[top] = taken + once * flow.iterations[index]
        return cls(cluster, tuple(seconds.values()))

    @classmethod
    def kept_or_predicted(cls, module: ir.Module, cluster: str, ctx: PassContext) -> OpTimes:
        """What the pass before kept, if it is of this cluster, else made anew."""
        kept = ctx.kept(cls)
        return kept if kept is not None and kept.cluster == cluster else cls.of(module, cluster, ctx.remark)
