"""What a rank does before jax starts: find out which rank it is, take its cores, and end the job if it fails."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bactrian.passes.errors import BactrianError
from bactrian.runtime import faults

# Launcher -> its variables for rank, size, local rank and local size.
_LAUNCHERS: dict[str, tuple[str, str, str, str]] = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class RankEnvironment:
    """Which process of the job this is, as its launcher says."""

    launcher: str  # "" without one
    rank: int
    size: int
    local_rank: int
    local_size: int


def rank_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment:
    """Which rank this is. Without a launcher: the only one. Starts no MPI."""
    environment = os.environ if environment is None else environment
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = (environment.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal():
            local = int(local_rank) if local_rank.isdecimal() else int(rank)
            return RankEnvironment(
                launcher, int(rank), int(size), local, int(local_size) if local_size.isdecimal() else int(size)
            )
    return RankEnvironment("", 0, 1, 0, 1)


def share_of_cores(cores: list[int], local_rank: int, local_size: int) -> list[int]:
    """This rank's cores of those of the machine: equal contiguous shares, the first ranks taking what is left over.

    With fewer cores than ranks, ranks share a core: 2 cores and 3 ranks give ``[0]``, ``[1]``, ``[0]``.
    """
    if len(cores) < local_size:
        return [cores[local_rank % len(cores)]]
    each, extra = divmod(len(cores), local_size)
    start = local_rank * each + min(local_rank, extra)
    return cores[start : start + each + (local_rank < extra)]


def pin_cores() -> list[int]:
    """Take this rank's share of the cores that the process may use, and as many threads. Call it before jax starts.

    What the launcher bound this rank to is its share already.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []  # macOS has no affinity
    place = rank_environment()
    cores = sorted(os.sched_getaffinity(0))
    if not _bound_by_launcher(set(cores)):
        cores = share_of_cores(cores, place.local_rank, place.local_size)
        os.sched_setaffinity(0, cores)
    for name in _THREAD_VARIABLES:
        os.environ.setdefault(name, str(len(cores)))
    return cores


def _bound_by_launcher(cores: set[int]) -> bool:
    """Whether this process may use fewer cores than the one that started it."""
    try:
        return cores < os.sched_getaffinity(os.getppid())
    except OSError:
        return False


def prepare() -> RankEnvironment:
    """Everything a rank needs before jax starts: its cores and the abort hook. Alone, nothing is changed."""
    place = rank_environment()
    if place.size > 1:
        install_abort_hook()
        pin_cores()
    faults.at("import")
    return place


def start_mpi() -> Any:
    """Initialize MPI with the abort hook in place; gives the communicator of all ranks."""
    install_abort_hook()
    from mpi4py import MPI

    faults.at("init")
    return MPI.COMM_WORLD


def exit_code_of(error: BaseException) -> int:
    """The exit code of the job that this error ends."""
    return error.exit_code if isinstance(error, BactrianError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def abort_job(code: int) -> None:
    """End every rank of the job, this one included, now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone
            stream.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


_STOPPED = 75  # a checkpoint was made after a stop signal: every rank leaves by itself


class _Hook:
    """What ends the job when this rank fails. Signals need nothing: the launcher sees a rank that one ended."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._usual_exit = sys.exit
        sys.excepthook = self.on_exception
        threading.excepthook = self.on_thread_exception
        sys.exit = self.exit
        atexit.register(self.on_exit)

    def on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Nobody caught it on the main thread."""
        traceback.print_exception(kind, error, trace)
        abort_job(exit_code_of(error))

    def on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        """Nobody caught it on another thread."""
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            self.on_exception(args.exc_type, args.exc_value, args.exc_traceback)

    def exit(self, status: Any = None, /) -> Any:
        """`sys.exit` that lets `on_exit` see whether the exit is an error; Python tells exit handlers nothing."""
        if threading.current_thread() is threading.main_thread():
            self.exit_code = 0 if status is None else status if isinstance(status, int) else 1
        self._usual_exit(status)

    def on_exit(self) -> None:
        """The interpreter ends, before MPI does: with an error, the others would wait in MPI's own end."""
        faults.at("exit")
        if self.exit_code not in (0, _STOPPED):
            abort_job(self.exit_code)


_hook: list[_Hook] = []


def install_abort_hook() -> None:
    """Make an uncaught exception on any thread, or an exit with an error code, end the whole job: the other ranks would
    wait for ever."""
    if not _hook:
        _hook.append(_Hook())
