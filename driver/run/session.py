"""A staged program on this process's share of the cluster: compiled functions, streams, executors."""

from __future__ import annotations

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
from bactrian.driver.run.distributed_meshes import devices_of_ranks, meshes_of, ranks_per_mesh
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
from bactrian.passes.machine.spec import UNSHARDED, MeshAxes, Spec
from bactrian.runtime import faults
from bactrian.runtime.control import Control
from bactrian.runtime.executor import Executor, Meter, run_together
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import StreamStatistics, check_streams
from bactrian.runtime.instructions import InstructionStream, Slot
from bactrian.runtime.mesh_groups import share_streams
from bactrian.runtime.rank_lifecycle import pin_cores
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
        spec = self._program.values[slot.value].spec if slot.value >= 0 else UNSHARDED
        return self.of_spec(slot.stage, spec)

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
    """How many stages can have ranks of their own, each as many as such a mesh takes."""
    world = World.current()
    return 1 if world.num_ranks == 1 else world.num_ranks // ranks_per_mesh([mesh], world, jax.local_devices())


def check_ranks(meshes: Sequence[MeshAxes], world: World) -> int:
    """The ranks that each mesh takes.

    Raises:
        ConfigError: the ranks or their devices do not fit the stages' meshes.
    """
    shared = ranks_per_mesh(meshes, world, jax.local_devices())
    stage_ranks(len(meshes), world.num_ranks, shared)
    return shared


def stage_ranks(num_stages: int, num_ranks: int, ranks_per_mesh: int = 1) -> tuple[int, ...]:
    """Stages dealt round to ranks, or to groups of consecutive ranks, consecutive stages to different ones.

    Raises:
        ConfigError: there are more ranks than stages have use for.
    """
    groups = num_ranks // ranks_per_mesh
    if groups > num_stages:
        each, most = ranks_per_mesh, num_stages * ranks_per_mesh
        fitting = f"{each} ranks" if num_stages == 1 else f"a multiple of {each} ranks up to {most}"
        if each == 1 < num_stages:
            fitting = f"1 to {num_stages} ranks"
        whose = "one rank" if each == 1 else f"{each} ranks"
        raise ConfigError(
            f"the plan has {num_stages} stage{'s' * (num_stages > 1)}, but {num_ranks} ranks were started",
            why=f"a stage belongs to {whose}, so a rank without a stage would have nothing to do",
            fix=f"start {fitting}, or ask for num_stages={groups}",
        )
    return tuple(stage % groups for stage in range(num_stages))


def open_session(staged: StagedPlan, world: World) -> Session:
    """Compile this process's stages and build its instruction streams (collective under MPI)."""
    program, clock = staged.program, PhaseClock()
    local = jax.local_devices()
    shared = ranks_per_mesh(meshes_of(program), world, local)
    several = world.num_ranks > 1
    num_ranks = world.num_ranks if several else _own_ranks(program, len(local))
    groups = stage_ranks(program.num_stages, num_ranks, shared)
    with clock.phase("build instructions"):
        streams = share_streams(build_streams(program, groups, broadcast_results=several), program, shared)
        statistics = check_streams(streams)
    mesh_control = None
    if several:
        own = (streams[world.rank],)
        if shared > 1:
            mesh_control = world.control.split(world.rank // shared)
            local = devices_of_ranks(own[0].mesh_ranks)
        devices = {stage: _devices_of(program, stage, i, local) for i, stage in enumerate(own[0].stages)}
    else:
        own = streams
        devices = {stage: _devices_of(program, stage, rank, local) for stage, rank in enumerate(groups)}
    transports = choose(world.control, [stream.rank for stream in own], device_array, ranks_per_mesh=shared)
    functions = _compile(staged, devices, clock)
    on_cores = all(device.platform == "cpu" for mesh in devices.values() for device in mesh)
    inline = several and (len(pin_cores()) == 1 or shared > 1) and on_cores
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


def _own_ranks(program: StagedProgram, num_devices: int) -> int:
    """How many stages can have devices of their own in one process, all meshes taken to be as large as the largest."""
    largest = max(program.num_devices(stage) for stage in range(program.num_stages))
    return min(program.num_stages, num_devices // largest)


def _devices_of(program: StagedProgram, stage: int, place: int, local: Sequence[JaxDevice]) -> tuple[JaxDevice, ...]:
    """The devices of a stage's mesh: the ``place``-th lot of so many, beginning again when there are no more."""
    count = program.num_devices(stage)
    first = count * (place % (len(local) // count))
    return tuple(local[first : first + count])


def _compile(
    staged: StagedPlan, devices: Mapping[int, Sequence[JaxDevice]], clock: PhaseClock
) -> dict[str, CompiledFunction]:
    faults.at("compile")
    with clock.phase("print functions"):
        texts = function_texts(staged.module)
    homes = {call.function: devices[call.stage] for call in staged.program.calls if call.stage in devices}
    with clock.phase("compile"):
        return compile_functions({symbol: texts[symbol] for symbol in homes}, homes)
