"""Which transport the values of a step take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import Control, MpiControl
from bactrian.runtime.rank_lifecycle import has_own_cores
from bactrian.runtime.transports.in_process import LocalNetwork
from bactrian.runtime.transports.interface import DeviceArray, Transport

if TYPE_CHECKING:
    from bactrian.runtime.transports.mpi import MpiTransport


def choose(
    control: Control, ranks: Sequence[int], device_array: DeviceArray, *, ranks_per_mesh: int = 1
) -> list[Transport]:
    """A transport for each of the ranks that run in this process (collective).

    MPI between processes; ``jax.device_put`` where one process has all ranks.

    Args:
        control: the ranks of the job.
        ranks: of them, those whose instructions run in this process.
        device_array: how host arrays come to a device.
        ranks_per_mesh: how many ranks have devices of one mesh.

    Raises:
        ConfigError: this MPI can't do what ranks that share meshes need.
    """
    if not isinstance(control, MpiControl):
        network = LocalNetwork()
        return [network.transport(rank) for rank in ranks]
    transport = _of_job(control.comm, device_array)
    if ranks_per_mesh > 1 and not transport.has_helper:
        raise ConfigError(
            f"a mesh takes {ranks_per_mesh} ranks, but this MPI lets one thread at a time use it",
            why="messages have to go on while a rank waits in a call for the others of its mesh",
            fix="use an MPI with MPI_THREAD_MULTIPLE, as Open MPI and MPICH from `pip` have it",
        )
    return [transport]


_started: list[tuple[Any, MpiTransport]] = []  # of this process, with the communicator that each was made of


def _of_job(comm: Any, device_array: DeviceArray) -> MpiTransport:
    """One for all steps of a job, with one communicator and one helper thread: steps run one after another."""
    from bactrian.runtime.transports.mpi import MpiTransport

    for known, transport in _started:
        if known is comm:
            return transport
    _started.append((comm, MpiTransport(comm, own_cores=has_own_cores(), device_array=device_array)))
    return _started[-1][1]
