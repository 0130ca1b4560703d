"""The predicted step: discrete events of the staged program, with the cost model's seconds on a cluster's devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.mesh_transfers import enough_hosts, mesh_transfer, replication_seconds, stage_devices
from bactrian.passes.pipelining.pipeline_events import Function, Message, Pipeline, PipelineTimes, simulate
from bactrian.passes.plan.schema import Plan
from bactrian.passes.plan.step_timing import StageTiming, TransferTiming
from bactrian.runtime.staged_program import Call, StagedProgram
from bactrian.runtime.unrolled_step import stage_tasks


@dataclass(frozen=True)
class PlacedProgram:
    """A program in stages, whose meshes have their places on a cluster's line.

    Attributes:
        program: in stages.
        cluster: the hosts; where all are equal, as many as are needed.
        devices: of each stage, numbered along the line.
    """

    program: StagedProgram
    cluster: Cluster
    devices: tuple[range, ...]

    @classmethod
    def of(cls, program: StagedProgram, cluster: Cluster, firsts: Sequence[int] | None = None) -> PlacedProgram:
        """With the first device of every stage, if that is decided; else stages lie along the line.

        Raises:
            ConfigError: the cluster has no place for the stages.
        """
        counts = [program.num_devices(stage) for stage in range(program.num_stages)]
        cluster = enough_hosts(cluster, counts)
        return cls(program, cluster, stage_devices(cluster, counts, firsts))

    def with_calls(self, timings: Sequence[StageTiming]) -> tuple[StageTiming, ...]:
        """The seconds of the stages with what their calls take beside their work."""
        return tuple(
            replace(timing, calls_seconds=len(stage_tasks(self.program, stage)) * self._hosts(stage).call_seconds)
            for stage, timing in enumerate(timings)
        )

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Of a device of each stage."""
        return tuple(self._hosts(stage).memory_bytes for stage in range(self.program.num_stages))

    def transfers(self) -> tuple[TransferTiming, ...]:
        """How long each of the program's transfers takes on the links."""
        program, origins = self.program, _origins(self.program)
        meshes = [self._hosts(stage).mesh(program.mesh(stage)) for stage in range(program.num_stages)]
        found = list[TransferTiming]()
        for transfer in program.transfers:
            value, source = program.values[transfer.target], program.values[origins[transfer.target]].stage
            sent = mesh_transfer(self.cluster, self.devices[source], self.devices[value.stage], value.nbytes)
            latency = sent.latency + replication_seconds(meshes[value.stage], value.spec, value.nbytes)
            found.append(TransferTiming(source, value.stage, value.nbytes, sent.seconds, latency, sent.links))
        return tuple(found)

    def _hosts(self, stage: int) -> HostGroup:
        return self.cluster.group_of(self.devices[stage][0])


def pipeline_of(plan: Plan, program: StagedProgram) -> Pipeline | None:
    """A plan's step as a pipeline whose events can be found; None where no times were predicted.

    Function ``i`` is call ``i`` of the program, mesh ``s`` is that of stage ``s``. As soon as a value is made, it is sent
    to each stage that reads it.

    Raises:
        ConfigError: the program is not that of the plan.
    """
    timings = [stage.timing for stage in plan.stages if stage.timing is not None]
    if len(timings) < plan.num_stages:
        return None
    if len(plan.transfers) != len(program.transfers) or program.num_stages != plan.num_stages:
        raise ConfigError("the plan and the program in stages do not belong together", fix="make the plan again")
    sent, first = _messages(plan, program)
    turns = plan.num_microbatches // program.num_microbatches
    order = tuple(tuple(stage_tasks(program, stage)) for stage in range(program.num_stages))
    extra = [timing.calls_seconds / max(1, len(tasks)) for timing, tasks in zip(timings, order, strict=True)]
    functions = tuple(
        Function(
            name=call.function,
            mesh=call.stage,
            seconds=_call_seconds(program, call, timings[call.stage], turns) + extra[call.stage],
            per_microbatch=not call.runs_once,
            messages=tuple(messages),
        )
        for call, messages in zip(program.calls, sent, strict=True)
    )
    return Pipeline(functions, order, program.num_microbatches, tuple(first))


def simulated(plan: Plan, program: StagedProgram) -> tuple[Plan, PipelineTimes | None]:
    """The plan with what its simulated step takes, and the events of that."""
    pipeline = pipeline_of(plan, program)
    if pipeline is None:
        return plan, None
    times = simulate(pipeline)
    stages = list(plan.stages)
    for number, (stage, mesh) in enumerate(zip(plan.stages, times.meshes, strict=True)):
        assert stage.timing is not None  # else there is no pipeline
        timing = replace(
            stage.timing,
            bubble_seconds=max(0.0, mesh.bubble),
            exposed_seconds=mesh.exposed,
            communication_seconds=mesh.communication,
        )
        stages[number] = replace(stage, timing=timing)
    return replace(plan, stages=tuple(stages), predicted_step_seconds=times.seconds), times


def _origins(program: StagedProgram) -> dict[int, int]:
    """Of every value that is transferred, the one that it is made from, on whatever stage."""
    origins = dict[int, int]()
    for transfer in program.transfers:  # in program order: what comes from a transfer comes after it
        origins[transfer.target] = origins.get(transfer.source, transfer.source)
    return origins


def _messages(plan: Plan, program: StagedProgram) -> tuple[list[list[Message]], list[tuple[int, Message]]]:
    """What each call sends, and what is sent before the step; what nobody reads is not sent."""
    maker_of = {value: number for number, call in enumerate(program.calls) for value in call.outputs}
    reader_of = dict[int, int]()
    for number, call in enumerate(program.calls):
        for value in call.inputs:
            reader_of.setdefault(value, number)
    sent, first = [list[Message]() for _ in program.calls], list[tuple[int, Message]]()
    for (target, origin), timing in zip(_origins(program).items(), plan.transfers, strict=True):
        if target in reader_of:
            message = Message(
                reader_of[target], timing.link_seconds, timing.links, timing.latency_seconds, timing.nbytes
            )
            if origin in maker_of:
                sent[maker_of[origin]].append(message)
            else:
                first.append((timing.source, message))
    return sent, first


def _call_seconds(program: StagedProgram, call: Call, timing: StageTiming, turns: int) -> float:
    """Of one call. The last round of a stage's update has all of it; without one, the function of both phases does."""
    rounds = [other.round for other in program.calls if other.stage == call.stage and other.phase == "update"]
    match call.phase:
        case "prepare":
            return timing.prepare_seconds
        case "forward":
            return timing.forward_seconds
        case "backward":
            return timing.backward_seconds
        case "forward_backward":
            both = turns * (timing.forward_seconds + timing.backward_seconds)
            return both if rounds else both + timing.update_seconds
        case "update" if call.round == max(rounds):
            return timing.update_seconds
        case _:
            return 0.0


def measured_timing(plan: Plan, program: StagedProgram, stage: int, seconds: Mapping[str, float]) -> StageTiming:
    """The seconds of a stage from measured ones of its functions, which have all that calls take.

    What one function does together, forward, backward and perhaps the update, is divided as it was predicted.

    Args:
        plan, program: of the stage.
        stage: its number.
        seconds: of each of its functions, by symbol.
    """
    predicted = plan.stages[stage].timing or StageTiming()
    turns = plan.num_microbatches // program.num_microbatches
    forward = backward = update = prepare = 0.0
    for call in program.calls:
        if call.stage != stage:
            continue
        taken = seconds[call.function]
        match call.phase:
            case "forward":
                forward += taken
            case "backward":
                backward += taken
            case "prepare":
                prepare += taken
            case "forward_backward":
                both = predicted.forward_seconds + predicted.backward_seconds
                expected = _call_seconds(program, call, predicted, turns)
                factor = taken / expected if expected else 0.0
                forward += factor * predicted.forward_seconds
                backward += factor * predicted.backward_seconds
                update += factor * (expected - turns * both)
            case _:
                update += taken
    return StageTiming(forward, backward, update, prepare)
