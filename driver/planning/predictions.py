"""What is predicted of every stage: its work, its memory and what it sends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxlib.mlir import ir

from bactrian.driver.planning.stage_traffic import StageTraffic
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    INITIALIZE,
    PHASES,
    PREPARE,
    UPDATE,
    layer_of,
    phase_of,
    stage_of,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.plan.schema import StagePlan
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming
from bactrian.passes.schedules.schedule import peak_in_flight
from bactrian.passes.stages.op_times import OpTimes
from bactrian.runtime.staged_program import StagedProgram


def is_timed(platform: str, cluster: str) -> bool:
    """Whether times can be predicted: a file describes the devices, or they are cores."""
    return bool(cluster) or platform == "cpu"


@dataclass(frozen=True, slots=True)
class PlacedOp:
    """An op of ``@main`` with the phase, stage and layer that it was given, and what one run of it costs."""

    op: ir.Operation
    phase: str
    stage: int
    layer: int | None
    flops: float
    seconds: float


def placed_ops(flow: MainDataflow, times: OpTimes) -> list[PlacedOp]:
    """The ops that have a stage, in program order, as ``assign-stages`` leaves them: later passes drop the layers.

    Args:
        flow: of ``@main``.
        times: of its ops.
    """
    model = CostModel()
    found: list[PlacedOp] = []
    for op, seconds in zip(flow.ops, times.seconds, strict=True):
        phase, stage = phase_of(op), stage_of(op)
        if phase is not None and stage is not None:
            found.append(PlacedOp(op, phase, stage, layer_of(op), model.flops(op), seconds))
    return found


def first_layers(ops: Iterable[PlacedOp], num_stages: int, num_layers: int) -> tuple[int, ...]:
    """The first layer of every stage; 0 for the first stage, whatever its ops are. A stage without ops has one layer."""
    first: dict[int, int] = {}
    for op in ops:
        if op.layer is not None:
            first[op.stage] = min(op.layer, first.get(op.stage, op.layer))
    starts, end = list[int](), num_layers
    for stage in range(num_stages - 1, 0, -1):
        end = first.get(stage, end - 1)
        starts.append(end)
    return (0, *reversed(starts))


@dataclass
class StageWork:
    """Flops and predicted seconds of a stage on one device, by phase: of one microbatch, or once per step."""

    flops: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, op: PlacedOp) -> None:
        """Count one op."""
        self.flops[op.phase] = self.flops.get(op.phase, 0.0) + op.flops
        self.seconds[op.phase] = self.seconds.get(op.phase, 0.0) + op.seconds

    @property
    def timing(self) -> StageTiming:
        """The seconds alone; what is initialized counts as the update."""
        seconds = {phase: self.seconds.get(phase, 0.0) for phase in PHASES}
        update = seconds[INITIALIZE] + seconds[UPDATE]
        return StageTiming(seconds[FORWARD], seconds[BACKWARD], update, seconds[PREPARE])


def stage_work(ops: Iterable[PlacedOp], num_stages: int) -> tuple[StageWork, ...]:
    """The work of every stage."""
    work = tuple(StageWork() for _ in range(num_stages))
    for op in ops:
        work[op.stage].add(op)
    return work


def stage_plan(
    program: StagedProgram,
    stage: int,
    layers: range,
    work: StageWork,
    *,
    num_microbatches: int,
    first_device: int | None,
    timing: StageTiming | None,
    sharding: ShardingPlan | None,
) -> StagePlan:
    """What is predicted of one stage.

    Args:
        program: the staged program.
        stage: its number.
        layers: that it is made of.
        work: its ops.
        num_microbatches: of a step.
        first_device: of its mesh, where it was given.
        timing: its seconds; None where nothing is known of the speed of its devices.
        sharding: on a mesh, what was chosen.
    """
    traffic = StageTraffic(program, stage)
    parameters = traffic.state_values(lambda phase: phase != "update")
    return StagePlan(
        stage=stage,
        first_layer=layers[0],
        first_device=first_device,
        last_layer=layers[-1],
        forward_flops=round(work.flops.get("forward", 0.0)),
        backward_flops=round(work.flops.get("backward", 0.0)),
        num_parameters=sum(math.prod(program.values[value].shape) for value in parameters),
        parameter_bytes=sum(program.values[value].nbytes for value in parameters),
        state_bytes=sum(program.values[v].nbytes for v in traffic.state_values(lambda phase: True)),
        mesh=program.mesh(stage),
        prepared_bytes=traffic.prepared_bytes(),
        activation_bytes=traffic.activation_bytes(),
        microbatches_in_flight=peak_in_flight(program.order[stage]),
        sent_bytes_forward=traffic.sent_bytes(("forward",)),
        sent_bytes_backward=traffic.sent_bytes(("backward", "forward_backward")),
        update_sent_bytes=traffic.sent_bytes(None),
        predicted_seconds=None if timing is None else timing.busy_seconds(num_microbatches),
        sharding=sharding,
        timing=timing,
    )
