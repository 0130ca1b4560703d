"""The sharding problem of each stage, read from a module before its shardings are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    FIRST_DEVICES,
    NUM_MICROBATCHES,
    NUM_STAGES,
    integer_attribute,
    read_first_devices,
)
from bactrian.passes.ir.meshes import USER_MESH, mesh_axes
from bactrian.passes.ir.module_schedule import fused_phases, schedule_of
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import MeshAxes, num_devices
from bactrian.passes.sharding.operations_from_ir import FlowFacts
from bactrian.passes.sharding.work_from_ir import Reading, read_program


@dataclass(frozen=True)
class StageProgram:
    """What one stage does.

    Attributes:
        stage: its number.
        mesh_name: the symbol of its mesh.
        mesh: its devices.
        memory_bytes: of each of them.
        reading: its part of ``@main``.
        num_stages: how many stages there are.
        num_microbatches: how often forward and backward run in a step.
    """

    stage: int
    mesh_name: str
    mesh: Mesh
    memory_bytes: int
    reading: Reading
    num_stages: int
    num_microbatches: int

    @property
    def only(self) -> int | None:
        """The stage's number, where there are several."""
        return self.stage if self.num_stages > 1 else None


def stage_meshes(module: ir.Module) -> dict[str, MeshAxes]:
    """The axes of every stage's mesh by its symbol, in the order of the stages; nothing where all have one device.

    Raises:
        PassError: a mesh of several devices belongs to no stage, or a stage has no mesh.
    """
    stages = integer_attribute(module.operation, NUM_STAGES) or 1
    meshes = mesh_axes(module)
    wide = [name for name, axes in meshes.items() if num_devices(axes) > 1 and name != USER_MESH]
    if not wide:
        return {}
    names = [f"stage{stage}" for stage in range(stages)]
    if strange := [name for name in wide if name not in names]:
        raise PassError(
            f"mesh @{strange[0]} has several devices, but belongs to no stage",
            fix="run adopt-shardings first, or call it @stage0",
        )
    if missing := [name for name in names if name not in meshes]:
        raise PassError(
            f"stage {names.index(missing[0])} has no mesh",
            fix=f"run assign-stages first, or add sdy.mesh @{missing[0]}",
        )
    return {name: meshes[name] for name in names}


def read_stages(
    module: ir.Module, meshes: dict[str, MeshAxes], cluster: Cluster, remark: Callable[[ir.Operation, str], None]
) -> list[StageProgram]:
    """The programs of all stages.

    Args:
        module: as `read_stage` wants it.
        meshes: of all stages, as `stage_meshes` gives them.
        cluster: whose devices the meshes are made of.
        remark: told of ops that nothing is known of.

    Raises:
        ConfigError: the cluster has too few devices for a mesh.
        PassError, ProgramError: as `read_program`.
    """
    hosts = stage_hosts(module, meshes, cluster)
    facts = FlowFacts.of(main_function(module))
    return [
        read_stage(module, stage, own.mesh(axes), own, remark, facts)
        for stage, (axes, own) in enumerate(zip(meshes.values(), hosts, strict=True))
    ]


def stage_hosts(module: ir.Module, meshes: dict[str, MeshAxes], cluster: Cluster) -> tuple[HostGroup, ...]:
    """The hosts that every stage's devices are of: as the module says, else stages lie along the cluster's line.

    Where all hosts are equal and the module says nothing, all stages are of them, however many devices they have together.

    Raises:
        ConfigError: the cluster has too few devices.
        PassError: the module places other stages, or places them where their meshes can't be.
    """
    counts = [num_devices(axes) for axes in meshes.values()]
    firsts = read_first_devices(module)
    if firsts is None:
        if len(cluster.groups) == 1:
            return cluster.groups * len(counts)
        return tuple(map(cluster.group_of, cluster.places(counts)))
    if len(firsts) != len(counts):
        raise PassError(f"{FIRST_DEVICES} places {len(firsts)} stages, the module has {len(counts)}")
    for stage, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        if first < 0 or cluster.next_place(first, count) != first:
            raise PassError(
                f"{FIRST_DEVICES} places stage {stage} of {count} devices at device {first} of {cluster.name}",
                why=f"{cluster.description}; a mesh lies within a host or fills hosts of one kind",
            )
    return tuple(map(cluster.group_of, firsts))


def read_stage(
    module: ir.Module,
    stage: int,
    mesh: Mesh,
    hosts: HostGroup,
    remark: Callable[[ir.Operation, str], None],
    facts: FlowFacts | None = None,
) -> StageProgram:
    """The program of one stage, whatever the others' meshes and shardings are.

    Args:
        module: with ``sdy.sharding_rule`` on the ops of ``@main``, phases and stages; its loops read from outside what
            they never change (`capture_unchanged`).
        stage: its number.
        mesh: its devices.
        hosts: that these belong to.
        remark: told of ops that nothing is known of.
        facts: of ``@main``, where they are known.

    Raises:
        PassError, ProgramError: as `read_program`.
    """
    main = main_function(module)
    microbatches = integer_attribute(module.operation, NUM_MICROBATCHES) or 1
    stages = integer_attribute(module.operation, NUM_STAGES) or 1
    schedule = schedule_of(module)
    in_flight = 1 if schedule is None else schedule.in_flight(stage, stages, microbatches)
    reading = read_program(main, mesh, hosts, microbatches, remark, in_flight, stage if stages > 1 else None, facts)
    reading = replace(reading, fused=fused_phases(module, main, stage))
    return StageProgram(stage, f"stage{stage}", mesh, hosts.memory_bytes, reading, stages, microbatches)
