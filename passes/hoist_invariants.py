"""``hoist-invariants``: what no microbatch changes is computed once per step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Set
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    LAYER,
    MICROBATCH_INDEX,
    PREPARE,
    argument_roles,
    read_num_microbatches,
    set_phase,
)
from bactrian.passes.ir.cloning import clone_into_readers, copy_phase, is_elementwise, phase_key, phase_keys
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import BARRIER, COSTED_ALONE, FREE_IN_READERS
from bactrian.passes.ir.regions import custom_call_target, main_function, replace_reads
from bactrian.passes.machine.cluster_file import cluster_or_cores
from bactrian.passes.stages.layer_placement import LayerPlacement
from bactrian.passes.stages.op_times import OpTimes

_PER_STEP, _PER_MICROBATCH = LayerPlacement.at(1), LayerPlacement.at(0)


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Move what every microbatch would compute alike into a phase of its own, ``prepare``, before the first of them.

    An op is invariant if it depends on no batch argument and not on the microbatch's number: casts of parameters, gathers
    by constant indices, masks, bits drawn from a key of the state. In ``prepare`` it runs once per step, and its result is
    there once, not for each microbatch in flight. It is there all step long, however, so not all that is invariant
    is hoisted. Of each stage, the ops that run once are chosen such that the least is paid, which is a minimum cut of the
    data flow: of a value that is held its bytes and ``overhead-bytes``; of an op that runs for each microbatch the bytes
    that its device could have moved in the time that it takes, for all microbatches but the first, less those that
    reading a held result takes where the op would be fused into its readers. What XLA makes in passing (constants, iotas,
    broadcasts, slices, transposes) costs nothing; nor does an elementwise op on constants, which each reader gets for
    itself.

    What ``jax.checkpoint`` computes again from parameters is behind an optimization barrier and invariant all the same:
    it reads the parameters around the barrier.

    Requires: phases and stages (``assign-stages``); cheap ops on the stages that read them (``clone-cheap-ops``).
    Ensures: ops of the phase ``prepare`` depend on state and constants alone, and on their own stage.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
      func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<64x256xbf16> {bactrian.role = "batch"}) -> tensor<64x256xbf16> {
        %c = stablehlo.convert %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xbf16>
        %y = stablehlo.dot_general %x, %c, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
        return %y : tensor<64x256xbf16>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
      func.func public @main(%arg0: tensor<256x256xf32> {bactrian.role = "state"}, %arg1: tensor<64x256xbf16> {bactrian.role = "batch"}) -> tensor<64x256xbf16> {
        %0 = stablehlo.convert %arg0 {bactrian.phase = "prepare", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xbf16>
        %1 = stablehlo.dot_general %arg1, %0, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
        return %1 : tensor<64x256xbf16>
      }
    }
    ```

    The cast of the weight is done once for four microbatches.
    """

    name: ClassVar[str] = "hoist-invariants"
    summary: ClassVar[str] = "compute once per step what no microbatch changes"
    requires: ClassVar[tuple[str, ...]] = (
        "formed",
        "flat",
        "typed",
        "marked",
        "phased",
        "with-stages",
        "with-num-microbatches",
    )
    ensures: ClassVar[tuple[str, ...]] = ("phased", "assigned", "localized")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("hoisted", "ops computed once per step"),
        Statistic("held-bytes", "bytes of their results that are held all step long, all stages"),
    )

    overhead_bytes: int = option(8192, help="what handling a held buffer costs, as so many bytes")
    cluster: str = option(
        "", help="TOML file of the devices that time is predicted for; the cores of this host if empty"
    )

    skip: str = option("", help='stages that are left as they are, as in "0,3": those that do not fit otherwise')

    def check_options(self) -> None:
        """Stages are numbers."""
        if not all(word.strip().isdecimal() for word in self.skip.split(",") if self.skip.strip()):
            raise ConfigError(
                f"option skip of {self.name} is {self.skip!r}, must be numbers of stages", fix='as in "0,3"'
            )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """One minimum cut per stage, then new phases."""
        count = read_num_microbatches(module)
        if count == 1:  # nothing is done twice
            return
        main = main_function(module)
        flow = MainDataflow.of(main)
        skipped = {int(word) for word in self.skip.split(",")} if self.skip.strip() else set[int]()
        for stage in sorted(skipped):
            ctx.remark(
                main,
                f"stage {stage} computes for each microbatch what none of them changes",
                why="it does not fit into its devices with that held all step long",
            )
        invariants = _Invariants(flow, argument_roles(main), skipped)
        if not invariants.ops:
            return
        per_second = cluster_or_cores(self.cluster).groups[0].device.bytes_per_second
        traffic = [seconds * per_second for seconds in OpTimes.of(module, self.cluster, ctx.remark).seconds]
        hoisted, held = invariants.choose(traffic, count, self.overhead_bytes)
        invariants.hoist(hoisted)
        ctx.count("hoisted", len(hoisted))
        ctx.count("held-bytes", held)
        # Constants of the forward or backward phase that the hoisted ops read are theirs too.
        flow, constant = MainDataflow.of(main), invariants.constant
        here = [(stage, PREPARE) for stage in flow.stages]
        clone_into_readers(flow, phase_keys(flow), phase_key, copy_phase, lambda i, key: constant[i] and key == here[i])


class _Invariants:
    """The ops that compute the same for every microbatch.

    Attributes:
        ops: their numbers. Elementwise ops on constants are not among them: everyone computes these for himself.
        constant: of each op of ``@main`` whether it is such a one.
    """

    def __init__(self, flow: MainDataflow, roles: list[str], skipped: Set[int]) -> None:
        self._flow, self._users = flow, flow.users()
        self.ops: dict[int, None] = {}
        self.constant: list[bool] = []
        # Of each value: the one that it is (barriers forward what they read); whether no microbatch changes it.
        self._root = list(range(len(flow.values)))
        self._same = [role != "batch" for role in roles] + [False] * (len(flow.values) - flow.num_arguments)
        constant = [False] * len(flow.values)
        for index, op in enumerate(flow.ops):
            reads, results = flow.operands[index], flow.results[index]
            simple = is_elementwise(op) and all(constant[value] for value in reads)
            self.constant.append(simple)
            if op.name == BARRIER:
                for value, read in zip(results, reads, strict=True):
                    self._root[value], self._same[value] = self._root[read], self._same[read]
                continue
            same = simple or self._is_invariant(index)
            if same and not simple and flow.stages[index] not in skipped:
                self.ops[index] = None
            for value in results:
                constant[value], self._same[value] = simple, same

    def _is_invariant(self, index: int) -> bool:
        flow, op = self._flow, self._flow.ops[index]
        if flow.phases[index] not in (FORWARD, BACKWARD) or custom_call_target(op) == MICROBATCH_INDEX:
            return False
        ends = (flow.boundary, len(flow.ops) - 1)  # what these read is computed for each microbatch
        if any(user in ends for value in flow.results[index] for user in self._users[value]):
            return False
        return all(self._same[value] and self._is_here(value, index) for value in flow.operands[index])

    def _is_here(self, value: int, index: int) -> bool:
        """Whether the stage of an op has a value before the first microbatch without being sent it."""
        producer = self._flow.producer[self._root[value]]
        return producer < 0 or self._flow.stages[producer] == self._flow.stages[index]

    def choose(self, traffic: list[float], count: int, overhead: int) -> tuple[list[int], int]:
        """The ops to run once per step, and the bytes of what is held.

        Args:
            traffic: of each op the bytes that its device could move in the time that it takes.
            count: microbatches of a step.
            overhead: bytes, for each value that is held.
        """
        flow, placement = self._flow, LayerPlacement(2)
        nodes = {index: placement.node() for index in self.ops}
        for index, node in nodes.items():
            price = (count - 1) * self._saved(index, traffic[index])
            placement.pay(_PER_STEP, node, round(price))
            for value in flow.results[index]:
                readers = list(self._readers(value))
                if readers:
                    ends = [nodes.get(reader, _PER_MICROBATCH) for reader in readers]
                    end = _PER_MICROBATCH if _PER_MICROBATCH in ends else placement.lowest(ends)
                    placement.pay(node, end, flow.sizes[value] + overhead)
            for value in flow.operands[index]:
                producer = nodes.get(flow.producer[self._root[value]])
                if producer is not None:
                    placement.require(producer, node)
        layers = placement.solve()
        hoisted = [index for index, node in nodes.items() if layers[node] == 1]
        chosen = set(hoisted)
        held = sum(
            flow.sizes[value]
            for index in hoisted
            for value in flow.results[index]
            if any(reader not in chosen for reader in self._readers(value))
        )
        return hoisted, held

    def _saved(self, index: int, traffic: float) -> float:
        """Bytes that are not moved, or could have been, for each microbatch for which an op does not run."""
        flow, name = self._flow, self._flow.ops[index].name
        if name in FREE_IN_READERS:
            return 0.0
        if name in COSTED_ALONE:
            return traffic
        for value in flow.results[index]:
            if all(flow.ops[reader].name not in COSTED_ALONE for reader in self._readers(value)):
                traffic -= flow.sizes[value]  # it would be fused into its readers, which now read it from memory
        return max(0.0, traffic)

    def _readers(self, value: int) -> Iterator[int]:
        """The ops that read a value, also through barriers."""
        for user in self._users[value]:
            if self._flow.ops[user].name == BARRIER:
                for read, result in zip(self._flow.operands[user], self._flow.results[user], strict=True):
                    if read == value:
                        yield from self._readers(result)
            else:
                yield user

    def hoist(self, hoisted: list[int]) -> None:
        """Give ops the phase ``prepare``; they read around barriers. Of equal ones the first is left."""
        flow, first, dead = self._flow, dict[Hashable, int](), list[ir.Operation]()
        merged = dict[int, int]()
        for index in hoisted:
            op, reads = flow.ops[index], list[int]()
            set_phase(op, PREPARE)
            for value in flow.operands[index]:
                root = self._root[value]
                reads.append(merged.get(root, root))
                if root != value:
                    replace_reads(op, flow.values[value], flow.values[reads[-1]])
            equal = first.setdefault((*reads, _words(op)), index)
            if equal != index:
                for value, same in zip(flow.results[index], flow.results[equal], strict=True):
                    merged[value] = same
                    flow.values[value].replace_all_uses_with(flow.values[same])
                dead.append(op)
        for op in reversed(dead):
            op.erase()


def _words(op: ir.Operation) -> Hashable:
    """What an op does with its operands: equal for equal ones."""
    attributes = tuple((name, str(op.attributes[name])) for name in op.attributes if name != LAYER)
    regions = tuple(str(block) for region in op.regions for block in region.blocks)
    return op.name, attributes, regions, tuple(str(result.type) for result in op.results)
