"""A staged program on this process's share of the cluster: compiled functions, streams, executors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.ranks import World
from bactrian.driver.run.distributed_meshes import check_devices, devices_of_ranks, meshes_of
from bactrian.driver.xla.compile_stage import (
    CompiledFunction,
    JaxDevice,
    compile_functions,
    device_array,
    function_texts,
    mesh_sharding,
)
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.phase_times import PhaseClock, PhaseTime
from bactrian.passes.machine.spec import MeshAxes, Spec, axes_text, num_devices
from bactrian.runtime import faults
from bactrian.runtime.control import Control
from bactrian.runtime.executor import Executor, Meter, run_together
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import StreamStatistics, check_streams
from bactrian.runtime.instructions import InstructionStream, Slot
from bactrian.runtime.mesh_groups import share_streams
from bactrian.runtime.rank_lifecycle import pin_cores
from bactrian.runtime.stage_groups import StageGroups, deal_stages
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.timeline import Tracer, gather_traces, write_trace
from bactrian.runtime.transports.choose import choose

_log = logging.getLogger("bactrian")


class Places:
    """Where the values of a staged program live in this process."""

    def __init__(self, program: StagedProgram, devices: Mapping[int, Sequence[JaxDevice]]) -> None:
        self._program, self._devices = program, devices
        self._known: dict[tuple[int, Spec], Sharding] = {}

    def of_slot(self, slot: Slot) -> Sharding:
        """The sharding of a slot."""
        return self.of_spec(slot.stage, self._program.spec_on(slot.value, slot.stage))

    def of_value(self, value: int) -> Sharding:
        """The sharding of a value of the staged program."""
        return self.of_spec(self._program.values[value].stage, self._program.values[value].spec)

    def of_spec(self, stage: int, spec: Spec) -> Sharding:
        """JAX's sharding for a spec on a stage's mesh."""
        key = stage, spec
        if key not in self._known:
            self._known[key] = mesh_sharding(self._devices[stage], self._program.mesh(stage), spec)
        return self._known[key]


@dataclass
class Session:
    """The stages of one step function that live in this process, ready to run.

    Pieces of state are held by (argument, stage). In one process every virtual device is a rank of its own, and all
    streams are walked in turn; under MPI this process walks its own list.
    """

    staged: StagedPlan
    world: World
    streams: tuple[InstructionStream, ...]
    statistics: StreamStatistics
    executors: tuple[Executor, ...]
    devices: dict[int, tuple[JaxDevice, ...]]  # stage -> its mesh's devices, stages of this process only
    functions: dict[str, CompiledFunction]
    phases: tuple[PhaseTime, ...]  # of opening it
    places: Places
    mesh_control: Control | None = None  # of the ranks that this one shares its meshes with, if there are others
    tracer: Tracer | None = None
    meter: Meter | None = None
    _make: Callable[..., tuple[Executor, ...]] = field(default=lambda: (), repr=False)

    @cached_property
    def arguments(self) -> tuple[tuple[int, int], ...]:
        """What a step reads beside the batch: (argument, stage), in the order of ``run``."""
        return tuple((slot.argument, slot.stage) for e in self.executors for slot in e.stream.arguments)

    @cached_property
    def results(self) -> tuple[tuple[int, int], ...]:
        """What a step gives: (result, stage), in the order of ``run``."""
        return tuple((slot.result, slot.stage) for e in self.executors for slot in e.stream.results)

    def run(self, pieces: Sequence[jax.Array], batch: Mapping[int, Any]) -> list[jax.Array]:
        """One step: a piece for each of ``arguments`` and whole batch arrays by argument; one for each of ``results``."""
        if len(self.executors) == 1:
            return self.executors[0].step(pieces, batch)
        rest = iter(pieces)
        inputs = [list(islice(rest, len(e.stream.arguments))) for e in self.executors]
        return [value for values in run_together(self.executors, inputs, batch) for value in values]

    def observe(self, *, trace: bool = False, meter: bool = False) -> None:
        """Record times (``trace``) or held buffers (``meter``) from the next step on; both off: full speed."""
        self.tracer = Tracer() if trace else None
        self.meter = Meter() if meter else None
        self.executors = self._make(self.tracer, self.meter)

    def write_trace(self, path: str | Path) -> None:
        """Write what was recorded as one Chrome trace (collective; rank 0 writes). What can't be written is logged as
        an error: training goes on."""
        if self.tracer is None:
            raise ConfigError("nothing was traced", fix="call observe(trace=True) before the steps to be traced")
        events = gather_traces(self.tracer, self.world.control)
        if self.world.rank == 0:
            try:
                write_trace(path, events)
            except ConfigError as error:
                _log.error("%s", error)


def num_groups(mesh: MeshAxes) -> int:
    """How many stages can have ranks of their own, each as many as such a mesh takes.

    Raises:
        ConfigError: the ranks or their devices do not fit the mesh.
    """
    world = World.current()
    if world.num_ranks == 1:
        return 1
    local = jax.local_devices()
    check_devices([mesh], world, local)
    ranks = max(1, num_devices(mesh) // len(local))
    if world.num_ranks % ranks:
        groups = world.num_ranks // ranks
        raise ConfigError(
            f"a mesh {axes_text(mesh)} takes {ranks} ranks, but {world.num_ranks} ranks were started",
            why=f"{world.num_ranks} is no multiple of {ranks}",
            fix=f"start {groups * ranks or ranks} or {(groups + 1) * ranks} ranks",
        )
    return world.num_ranks // ranks


def groups_of_stages(meshes: Sequence[MeshAxes], world: World) -> StageGroups:
    """The ranks of each stage; in one process the streams, each of which is a rank of its own.

    Raises:
        ConfigError: the ranks or their devices do not fit the stages' meshes.
    """
    local = jax.local_devices()
    sizes = [num_devices(mesh) for mesh in meshes]
    check_devices(meshes, world, local)
    if world.num_ranks > 1:
        return deal_stages(sizes, len(local), world.num_ranks)
    lots = len(lots_of_devices(sizes, len(local)))
    return StageGroups(tuple(stage % lots for stage in range(len(sizes))), (1,) * lots)


def open_session(staged: StagedPlan, world: World) -> Session:
    """Compile this process's stages and build its instruction streams (collective under MPI)."""
    program, clock = staged.program, PhaseClock()
    local = jax.local_devices()
    groups = groups_of_stages(meshes_of(program), world)
    several = world.num_ranks > 1
    with clock.phase("build instructions"):
        streams = share_streams(build_streams(program, groups.of_stage, broadcast_results=several), program, groups)
        statistics = check_streams(streams)
    mesh_control = None
    if several:
        own = (streams[world.rank],)
        of_group = world.control.split(groups.of_rank(world.rank)) if max(groups.sizes) > 1 else None
        if own[0].mesh_ranks:
            mesh_control, local = of_group, devices_of_ranks(own[0].mesh_ranks)
        devices = _devices_of_rank(program, own[0].stages, local)
    else:
        own = streams
        devices = _devices_in_process(program, local)
    transports = choose(world.control, [stream.rank for stream in own], device_array, ranks_per_mesh=max(groups.sizes))
    functions = _compile(staged, devices, clock)
    on_cores = all(device.platform == "cpu" for mesh in devices.values() for device in mesh)
    inline = several and (len(pin_cores()) == 1 or bool(own[0].mesh_ranks)) and on_cores
    places = Places(program, devices)

    def make(tracer: Tracer | None = None, meter: Meter | None = None) -> tuple[Executor, ...]:
        return tuple(
            Executor(
                stream,
                functions,
                places.of_slot,
                transport,
                tracer=tracer,
                meter=meter,
                device_array=device_array,
                inline=inline,
            )
            for stream, transport in zip(own, transports, strict=True)
        )

    return Session(
        staged, world, streams, statistics, make(), devices, functions, clock.phases, places, mesh_control, _make=make
    )


def lots_of_devices(sizes: Sequence[int], num_devices: int) -> tuple[range, ...]:
    """Lots of devices to which stages are dealt round: as many lots as there are devices for. Stages of one lot share it.

    Args:
        sizes: devices of each stage's mesh.
        num_devices: that there are, enough for each mesh.

    >>> lots_of_devices([2, 1, 1], 4), lots_of_devices([2, 1, 1], 3)
    ((range(0, 2), range(2, 3), range(3, 4)), (range(0, 2), range(2, 3)))
    """
    ends = list[int]()
    for count in range(len(sizes), 0, -1):
        ends = list(itertools.accumulate(max(sizes[lot::count]) for lot in range(count)))
        if ends[-1] <= num_devices:
            break
    return tuple(range(start, end) for start, end in itertools.pairwise([0, *ends]))


def _devices_in_process(program: StagedProgram, local: Sequence[JaxDevice]) -> dict[int, tuple[JaxDevice, ...]]:
    """The devices of every stage's mesh in one process."""
    sizes = [program.num_devices(stage) for stage in range(program.num_stages)]
    lots = lots_of_devices(sizes, len(local))
    starts = [lots[stage % len(lots)].start for stage in range(len(sizes))]
    return {stage: tuple(local[start : start + sizes[stage]]) for stage, start in enumerate(starts)}


def _devices_of_rank(
    program: StagedProgram, stages: Sequence[int], local: Sequence[JaxDevice]
) -> dict[int, tuple[JaxDevice, ...]]:
    """The devices of the meshes of a rank's stages: the next ones, from the first again where too few are left."""
    found, start = dict[int, tuple[JaxDevice, ...]](), 0
    for stage in stages:
        count = program.num_devices(stage)
        start = start if start + count <= len(local) else 0
        found[stage] = tuple(local[start : start + count])
        start += count
    return found


def _compile(
    staged: StagedPlan, devices: Mapping[int, Sequence[JaxDevice]], clock: PhaseClock
) -> dict[str, CompiledFunction]:
    faults.at("compile")
    with clock.phase("print functions"):
        texts = function_texts(staged.module)
    homes = {call.function: devices[call.stage] for call in staged.program.calls if call.stage in devices}
    with clock.phase("compile"):
        return compile_functions({symbol: texts[symbol] for symbol in homes}, homes)
