"""The control plane of one process, and which transport is chosen for whom."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import MpiControl, SingleProcess
from bactrian.runtime.transports import mpi
from bactrian.runtime.transports.choose import choose
from bactrian.runtime.transports.in_process import InProcessTransport
from bactrian.runtime.transports.interface import WouldBlock, device_array


def test_the_control_plane_of_one_process() -> None:
    control = SingleProcess()
    control.barrier()
    assert (control.rank, control.size, control.broadcast("plan"), control.allgather(3)) == (0, 1, "plan", [3])
    values = np.arange(3)
    control.broadcast_array(values, 0)
    assert values.tolist() == [0, 1, 2] and control.split(7).size == control.duplicate().size == 1
    assert control.poll() is None
    with pytest.raises(ValueError, match="rank 1 of a job of one process"):
        control.send("x", 1)
    with pytest.raises(ValueError, match="rank 1 of a job of one process"):
        control.receive(1)


def test_ranks_of_one_process_share_a_network() -> None:
    first, second = choose(SingleProcess(), [0, 1], device_array)
    assert isinstance(first, InProcessTransport) and isinstance(second, InProcessTransport)
    place = SingleDeviceSharding(jax.devices()[0])
    handle = second.post_receive(0, 5, (3,), "float32", place)
    with pytest.raises(WouldBlock):
        second.wait(handle)
    first.send(jax.numpy.arange(3.0), 1, 5)
    assert second.wait(handle).tolist() == [0, 1, 2]


class OneThread:
    """The MPI transport of an MPI that lets one thread at a time use it."""

    has_helper = False

    def __init__(self, comm: object, **_: object) -> None:
        self.comm = comm


class Comm:
    """An mpi4py communicator, as far as it is asked for its size."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 2


def test_ranks_of_an_mpi_job_get_one_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "MpiTransport", OneThread)
    comm = Comm()
    (transport,) = choose(MpiControl(comm), [0], device_array)
    assert isinstance(transport, OneThread) and transport.comm is comm
    with pytest.raises(ConfigError, match="a mesh takes 2 ranks, but this MPI lets one thread at a time use it"):
        choose(MpiControl(comm), [0], device_array, ranks_per_mesh=2)


def test_all_steps_of_a_job_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "MpiTransport", OneThread)
    control = MpiControl(Comm())
    assert choose(control, [0], device_array) == choose(MpiControl(control.comm), [0], device_array)
    assert choose(control, [0], device_array) != choose(MpiControl(Comm()), [0], device_array)
