"""Peak memory of a staged module's functions on one device, as XLA for CPUs would need it, without compiling.

The IR becomes a graph of values with their bytes on a device (``graph_from_ir.py``, ``value_graph.py``). XLA's fusion is
predicted (``fusion.py``), which says what has a buffer; then the order of work, the live ranges and the packing of buffers
(``live_ranges.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.peak.graph_from_ir import read_function
from bactrian.passes.peak.live_ranges import temporary_bytes

_POINTER = 8
_MARGIN = 0.02
"""Of the temporaries: the error was at most 3 % of them at the peak of a stage (``benchmarks/README.md``)."""


@dataclass(frozen=True)
class FunctionMemory:
    """What one device holds for a function, in bytes, as XLA counts it.

    Attributes:
        arguments, results: all of them.
        aliased: results that are written into an argument's buffer (donation).
        temporaries: buffers beside these, at the peak.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All together, at the peak."""
        return self.arguments + self.results - self.aliased + self.temporaries


def module_memory(staged: ir.Module) -> dict[str, FunctionMemory]:
    """The memory of each stage function of a staged module, by its symbol."""
    with staged.context:
        found = dict[str, FunctionMemory]()
        for view in staged.body.operations:
            op = view.operation
            if op.name == "func.func" and (symbol := ir.StringAttr(op.attributes["sym_name"]).value) != "main":
                found[symbol] = function_memory(op)
        return found


def function_memory(main: ir.Operation) -> FunctionMemory:
    """The memory of one stage function."""
    graph = read_function(main)
    nodes, results = graph.nodes, graph.results
    return FunctionMemory(
        arguments=sum(node.nbytes for node in nodes if node.name == "argument"),
        results=sum(nodes[number].nbytes for number in results) + _POINTER * len(results),
        aliased=sum(nodes[number].nbytes for number in graph.aliases.values()),
        temporaries=round((1 + _MARGIN) * temporary_bytes(graph)) + _POINTER * len(results),
    )
