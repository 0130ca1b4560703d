"""What the search for a pipeline is given, and what it finds, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.pipelining.host_line import HostLine, Submesh
from bactrian.passes.pipelining.layer_options import LayerOption, Menu
from bactrian.passes.pipelining.measured_stages import MeasuredStage
from bactrian.passes.pipelining.step_time import period_seconds, step_seconds
from bactrian.passes.schedules.schedule import Schedule


@dataclass(frozen=True)
class FixedStages:
    """What is decided about stages before the search; None is what it finds.

    Attributes:
        num_stages: how many.
        first_layers: the first layer of each.
        meshes: of each stage, or a single one of all stages.
    """

    num_stages: int | None = None
    first_layers: tuple[int, ...] | None = None
    meshes: tuple[MeshAxes, ...] | None = None

    @property
    def known_stages(self) -> int | None:
        """The number of stages, if it follows from what is decided."""
        if self.num_stages is not None:
            return self.num_stages
        if self.first_layers is not None:
            return len(self.first_layers)
        return len(self.meshes) if self.meshes is not None and len(self.meshes) > 1 else None

    def allows_mesh(self, mesh: MeshAxes, stages_left: int) -> bool:
        """Whether the stage that is so many from the end, 1 for the last, may have this mesh."""
        if self.meshes is None:
            return True
        return mesh == (self.meshes[0] if len(self.meshes) == 1 else self.meshes[len(self.meshes) - stages_left])


@dataclass(frozen=True)
class PipelineProblem:
    """Layers, what they take, and where they may run, for one size and number of microbatches and one schedule.

    Attributes:
        kinds: of each layer, its kind.
        border_bytes: of each layer, what a microbatch sends to it from the layers before and back.
        line: of hosts.
        menus: by kind of host.
        num_microbatches: of a step.
        schedule: that is followed.
        fixed: what is decided already.
        measured: stages that correct what options say.
    """

    kinds: tuple[int, ...]
    border_bytes: tuple[float, ...]
    line: HostLine
    menus: tuple[tuple[Menu, ...], ...]
    num_microbatches: int
    schedule: Schedule
    fixed: FixedStages = field(default_factory=FixedStages)
    measured: tuple[MeasuredStage, ...] = ()

    @property
    def num_layers(self) -> int:
        """Of the program."""
        return len(self.kinds)

    def calls(self, stages_left: int, submesh: Submesh, *, is_only: bool) -> tuple[int, int]:
        """How many calls the stage that is so many from the end makes for a microbatch, and beside these for a step.

        A forward and a backward, which the schedule may fuse; and one for the accumulators, and the update. On one
        device, a pipeline of a single fused stage is one call (``loop-microbatches``).

        Args:
            stages_left: 1 for the last stage.
            submesh: of the stage.
            is_only: whether it has all layers.
        """
        if not self.schedule.fuses(0, stages_left):
            return 2, 2
        return (0, 1) if is_only and submesh.num_devices == 1 else (1, 2)

    def call_seconds(self, stages_left: int, submesh: Submesh, *, is_only: bool) -> tuple[float, float]:
        """What `calls` take beside their work."""
        seconds = self.line.kinds[submesh.kind].call_seconds
        per_microbatch, per_step = self.calls(stages_left, submesh, is_only=is_only)
        return per_microbatch * seconds, per_step * seconds


@dataclass(frozen=True)
class Place:
    """A stage on the line: its layers from the first to before the end, its submesh, and the first device of it."""

    first_layer: int
    end_layer: int
    submesh: Submesh
    first_device: int


@dataclass(frozen=True)
class StageChoice:
    """One stage: its layers, its place and mesh, an option of each layer, and what they take.

    Attributes:
        place: its layers and devices.
        mesh: the axes of its devices.
        in_flight: microbatches that it holds at most.
        options: of each layer.
        call_seconds: what the calls of a microbatch take beside their work, and the other calls of a step.
        seconds_factor, update_factor: by how much it takes longer than its options say, as far as stages were measured.
    """

    place: Place
    mesh: MeshAxes
    in_flight: int
    options: tuple[LayerOption, ...]
    call_seconds: tuple[float, float] = (0.0, 0.0)
    seconds_factor: float = 1.0
    update_factor: float = 1.0

    @property
    def seconds(self) -> float:
        """Of a microbatch, forward and backward."""
        return self.seconds_factor * (
            self.call_seconds[0] + sum(option.forward_seconds + option.backward_seconds for option in self.options)
        )

    @property
    def update_seconds(self) -> float:
        """Once per step."""
        return self.update_factor * (self.call_seconds[1] + sum(option.update_seconds for option in self.options))

    @property
    def memory_bytes(self) -> float:
        """Of a device, at the fullest moment."""
        held = sum(option.state_bytes + self.in_flight * option.kept_bytes for option in self.options)
        return held + max(option.working_bytes for option in self.options)


@dataclass(frozen=True)
class PipelineChoice:
    """Stages, and how long a step of them takes.

    Attributes:
        stages: along the line.
        step_seconds: of the closed form (`step_time`).
        period_seconds: between two microbatches.
    """

    stages: tuple[StageChoice, ...]
    step_seconds: float
    period_seconds: float

    @classmethod
    def of(cls, problem: PipelineProblem, stages: Sequence[StageChoice]) -> PipelineChoice:
        """The step time of stages."""
        seconds, in_flight = [stage.seconds for stage in stages], [stage.in_flight for stage in stages]
        trips = round_trips(problem, [stage.place for stage in stages])
        updates = [stage.update_seconds for stage in stages]
        return cls(
            tuple(stages),
            step_seconds(seconds, trips, updates, in_flight, problem.num_microbatches),
            period_seconds(seconds, trips, in_flight, problem.num_microbatches),
        )


def round_trips(problem: PipelineProblem, places: Sequence[Place]) -> list[float]:
    """Seconds between each stage and the next, there and back."""
    found, line = list[float](), problem.line
    for sender, receiver in pairwise(places):
        in_host = line.host_of(sender.first_device + sender.submesh.num_devices - 1) == line.host_of(
            receiver.first_device
        )
        nbytes = np.array(problem.border_bytes[receiver.first_layer])
        found.append(float(line.round_trip(nbytes, sender.submesh, receiver.submesh, in_host=in_host)))
    return found


def in_flight_by_stages_left(schedule: Schedule, most: int, num_microbatches: int) -> Sequence[int]:
    """How many microbatches the stage that is so many from the end holds; of the last one at 1.

    It does not depend on how many stages stand before it.
    """
    return [0, *(schedule.in_flight(0, left, num_microbatches) for left in range(1, most + 1))]
