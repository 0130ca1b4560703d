"""Meshes with the devices of several ranks: joining the ranks' devices by ``jax.distributed``, and dealing them out."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import jax

from bactrian.driver.xla.compile_stage import JaxDevice
from bactrian.driver.xla.loopback import LOOPBACK, use_loopback
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.spec import MeshAxes, axes_text, num_devices
from bactrian.runtime.control import Control
from bactrian.runtime.staged_program import StagedProgram

_SHUTDOWN_SECONDS = 24 * 60 * 60  # ranks that are done wait for the others, as at the end of MPI


def join_ranks(control: Control) -> None:
    """Make the devices of all ranks known to each (collective), before jax starts.

    A rank that dies is noticed by mpirun and the launcher, which end the job; JAX's own heartbeat is what is left where
    they can't.
    """
    host = socket.gethostname()
    local = LOOPBACK if len(set(control.allgather(host))) == 1 else None
    if local:
        use_loopback()
    port = 0
    if control.rank == 0:
        with socket.create_server((local or "", 0)) as server:
            port = server.getsockname()[1]
    port = control.broadcast(port)
    jax.distributed.initialize(
        f"{local or control.broadcast(host)}:{port}",
        control.size,
        control.rank,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        coordinator_bind_address=local and f"{local}:{port}",
    )


def check_devices(meshes: Sequence[MeshAxes], world: Any, local: Sequence[JaxDevice]) -> None:
    """Refuse meshes that ranks can't hold: a mesh has some of the devices of one rank, or all of several.

    Args:
        meshes: names and sizes of the axes of each stage's mesh.
        world: this process among its peers.
        local: this rank's devices.

    Raises:
        ConfigError: there are not the devices, or the ranks are not joined, or can't be divided so.
    """
    sizes, each = [num_devices(mesh) for mesh in meshes], len(local)
    if max(sizes) <= each:
        return
    _check_ranks_of(meshes, sizes.index(max(sizes)), world, each)
    for stage, needed in enumerate(sizes):
        if needed > each and needed % each:
            raise ConfigError(
                f"{_mesh_of(stage, meshes)}, each rank has {each}, which does not divide {needed}",
                why="a mesh has all devices of some ranks, or some of one",
                fix=f"take a mesh of a multiple of {each} devices, or ranks with another number of them",
            )


def _mesh_of(stage: int, meshes: Sequence[MeshAxes]) -> str:
    return f"stage {stage} has a mesh of {num_devices(meshes[stage])} devices ({axes_text(meshes[stage])})"


def _check_ranks_of(meshes: Sequence[MeshAxes], stage: int, world: Any, each: int) -> None:
    """Refuse ranks whose devices can't make up a mesh together."""
    several, needed = world.num_ranks > 1, num_devices(meshes[stage])
    whose = "each rank" if several else "this process"
    makes = f"bactrian run --devices {needed}, or XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
    if not several or not jax.distributed.is_initialized():
        joins = (
            "bactrian run --distributed joins the ranks' devices, as does jax.distributed.initialize("
            'cluster_detection_method="mpi4py") under mpirun, before jax is used; '
        )
        raise ConfigError(
            f"{_mesh_of(stage, meshes)}, {whose} has {each}",
            why="the devices of one mesh belong to one process, unless jax.distributed joins several",
            fix=f"{joins if several else ''}{makes}, makes as many of a CPU; or take a smaller mesh",
        )
    _check_joined(world)
    _check_equal_shares(each)


def _check_joined(world: Any) -> None:
    count, index = jax.process_count(), jax.process_index()
    if (count, index) != (world.num_ranks, world.rank):
        raise ConfigError(
            f"jax.distributed joins {count} processes, of which this is number {index}; "
            f"MPI has {world.num_ranks} ranks, of which this is number {world.rank}",
            why="messages between stages and collectives within them go by the same numbers",
            fix='jax.distributed.initialize(cluster_detection_method="mpi4py"), or bactrian run --distributed',
        )


def _check_equal_shares(each: int) -> None:
    shares = [0] * jax.process_count()
    for device in jax.devices():
        shares[device.process_index] += 1
    odd = [rank for rank, share in enumerate(shares) if share != each]
    if odd:
        raise ConfigError(
            f"rank {odd[0]} has {shares[odd[0]]} devices, rank {jax.process_index()} has {each}",
            why="a mesh over several ranks has equally many devices of each",
            fix="give every rank the same number of devices",
        )


def devices_of_ranks(ranks: Sequence[int]) -> list[JaxDevice]:
    """The devices of some ranks, rank by rank."""
    place = {rank: i for i, rank in enumerate(ranks)}
    mine = [device for device in jax.devices() if device.process_index in place]
    return sorted(mine, key=lambda device: (place[device.process_index], device.id))


def meshes_of(program: StagedProgram) -> tuple[MeshAxes, ...]:
    """The mesh of every stage."""
    return tuple(program.mesh(stage) for stage in range(program.num_stages))
