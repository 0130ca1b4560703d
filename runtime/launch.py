"""Start-up and end of a rank: who am I, which cores are mine, and that one rank's failure ends them all.

Nothing here imports jax; `prepare` must run before anything else does, since XLA takes every core that it may use.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bactrian.passes.errors import BactrianError
from bactrian.runtime import faults

# (rank, size, rank on this host, ranks on this host), by launcher
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """This process's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def find_job() -> Job | None:
    """This process's place, as its launcher tells it; None if it was not started by one."""
    for rank, size, local_rank, local_size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            number, count = int(os.environ[rank]), int(os.environ[size])
            local = int(os.environ.get(local_rank, number)), int(os.environ.get(local_size, count))
            return Job(number, count, *local)
    return None


def own_cores(allowed: set[int], total: int, job: Job) -> set[int]:
    """The cores a rank should use: what the launcher bound it to, else its equal share, else one, taken in turn.

    >>> own_cores({0, 1, 2, 3}, 4, Job(1, 2, 1, 2))
    {2, 3}
    """
    if len(allowed) < total or job.local_size == 1:
        return allowed
    cores = sorted(allowed)
    share = len(cores) // job.local_size
    if share == 0:
        return {cores[job.local_rank % len(cores)]}
    return set(cores[job.local_rank * share : (job.local_rank + 1) * share])


def pin(job: Job) -> set[int]:
    """Bind this process and the threads it will start to its own cores; gives them."""
    if not hasattr(os, "sched_setaffinity"):
        return set(range(os.cpu_count() or 1))
    allowed = os.sched_getaffinity(0)
    cores = own_cores(allowed, os.cpu_count() or len(allowed), job)
    if cores != allowed:
        os.sched_setaffinity(0, cores)
    return cores


def prepare() -> Job | None:
    """Everything a rank needs before jax starts: cores, threads, and the abort hook.

    Under no launcher nothing is changed.
    """
    job = find_job()
    if job is None:
        return None
    install_abort_hook()
    cores = pin(job)
    for name in _THREADS:
        os.environ.setdefault(name, str(len(cores)))
    faults.at("import")
    return job


def start_mpi() -> Any:
    """Initialize MPI so that any thread may call it, one at a time; gives the communicator of all ranks."""
    install_abort_hook()
    import mpi4py

    mpi4py.rc.thread_level = "serialized"
    from mpi4py import MPI

    faults.at("init")
    return MPI.COMM_WORLD


_installed = False
_exit_code: int | None = None


def install_abort_hook() -> None:
    """From now on an exception that nobody catches, on any thread, ends all ranks, as does an exit with an error code.

    Signals need nothing: a rank that one ends, ends the job through its launcher.
    """
    global _installed
    if _installed:
        return
    _installed = True
    sys.excepthook = _on_exception
    threading.excepthook = _on_thread_exception
    sys.exit = _noting_exit
    atexit.register(_on_exit)


def exit_code_of(error: BaseException) -> int:
    """The process's exit code for an exception: 1 is our bug or the user's, 3 to 6 are said by Bactrian's errors."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, BactrianError) else 1


def _on_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    traceback.print_exception(kind, error, where)
    abort(exit_code_of(error))


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    abort(exit_code_of(args.exc_value))


def _noting_exit(status: Any = None, /) -> Any:
    """`sys.exit` that lets `_on_exit` see whether the exit is an error."""
    global _exit_code
    _exit_code = 0 if status is None else status if isinstance(status, int) else 1
    raise SystemExit(status)


def _on_exit() -> None:
    faults.at("exit")
    if _exit_code:
        abort(_exit_code)


def abort(code: int) -> None:
    """End every rank of the job, now."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized() and module.COMM_WORLD.size > 1:
        module.COMM_WORLD.Abort(code)
    os._exit(code)
