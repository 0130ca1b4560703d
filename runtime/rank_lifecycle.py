"""Start-up and end of a rank: who am I, which cores are mine, and that one rank's failure ends them all.

Nothing here imports jax; `prepare` must run before anything else does, since XLA takes every core that it may use.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bactrian.passes.frame.errors import BactrianError
from bactrian.runtime import faults, lockstep
from bactrian.runtime.mpi_start import load_mpi

JOB_VARIABLE = "BACTRIAN_JOB"  # set by `bactrian run`, which leaves binding to the ranks
STOPPED = 75  # a checkpoint was made after a stop signal: every rank leaves by itself

# Launcher -> its variables for rank, size, local rank and local size.
_LAUNCHERS: dict[str, tuple[str, str, str, str]] = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_FIRST_SPECIAL_STEP = 0xFFFFFF00  # Slurm numbers batch scripts and interactive shells from the end
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks, as its launcher says."""

    launcher: str  # "" without one
    rank: int
    size: int
    local_rank: int
    local_size: int


def rank_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment:
    """Which rank this is. Without a launcher: the only one. Starts no MPI."""
    environment = os.environ if environment is None else environment
    slurm = _slurm_task(environment)
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = (environment.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal():
            if local_rank.isdecimal() and local_size.isdecimal():
                return RankEnvironment(launcher, int(rank), int(size), int(local_rank), int(local_size))
            if slurm is not None:  # srun gives the variables of PMI, which knows no hosts
                return RankEnvironment(launcher, int(rank), int(size), slurm.local_rank, slurm.local_size)
            return RankEnvironment(launcher, int(rank), int(size), int(rank), int(size))
    return slurm or RankEnvironment("", 0, 1, 0, 1)


def _slurm_task(environment: Mapping[str, str]) -> RankEnvironment | None:
    """This process as a task of a Slurm step.

    A batch script is none: it has the variables of a first task, and the number of tasks that its steps will have.
    """
    rank, size = environment.get("SLURM_PROCID", ""), environment.get("SLURM_STEP_NUM_TASKS", "")
    if not (rank.isdecimal() and size.isdecimal()) or int(environment.get("SLURM_STEP_ID", 0)) >= _FIRST_SPECIAL_STEP:
        return None
    local_rank, node = int(environment.get("SLURM_LOCALID", rank)), int(environment.get("SLURM_NODEID", 0))
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", size))
    return RankEnvironment("Slurm", int(rank), int(size), local_rank, tasks[node] if node < len(tasks) else tasks[-1])


def _tasks_per_node(text: str) -> list[int]:
    """How many tasks each node of a step has, from Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def share_of_cores(cores: list[int], local_rank: int, local_size: int) -> list[int]:
    """This rank's cores of those of the machine: equal contiguous shares, the first ranks taking what is left over.

    With fewer cores than ranks, ranks share a core: 2 cores and 3 ranks give ``[0]``, ``[1]``, ``[0]``.
    """
    if len(cores) < local_size:
        return [cores[local_rank % len(cores)]]
    each, extra = divmod(len(cores), local_size)
    start = local_rank * each + min(local_rank, extra)
    return cores[start : start + each + (local_rank < extra)]


_cores: list[int] | None = None
_shared = False


def has_own_cores() -> bool:
    """Whether no other rank of this job was given this rank's cores; known once `pin_cores` was called."""
    return _cores is not None and not _shared


def pin_cores() -> list[int]:
    """Take this rank's share of the cores, and as many threads; once, and before jax starts. Gives the cores.

    Under a bare mpirun that has bound the rank to some of the cores already, they are its share.
    """
    global _cores, _shared
    if _cores is None:
        if not hasattr(os, "sched_getaffinity"):
            return list(range(os.cpu_count() or 1))  # macOS has no affinity
        place, allowed = rank_environment(), sorted(os.sched_getaffinity(0))
        bound = JOB_VARIABLE not in os.environ and len(allowed) < (os.cpu_count() or 1)
        _cores = allowed if bound else share_of_cores(allowed, place.local_rank, place.local_size)
        _shared = place.local_size > (os.cpu_count() or 1 if bound else len(allowed))
        if _cores != allowed:
            os.sched_setaffinity(0, _cores)
        for name in _THREADS:
            os.environ.setdefault(name, str(len(_cores)))
    return _cores


# glibc's mallopt: parameter -> value.
_MALLOC = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD, as high as it goes: smaller blocks come from heaps, which are used again
    -1: 1 << 30,  # M_TRIM_THRESHOLD: so much free memory stays with the process
    -2: 64 << 20,  # M_TOP_PAD: heaps grow by this much
}


def keep_memory() -> bool:
    """Tell malloc to keep freed memory for later buffers of up to 32 MiB; false where the user or the system decides.

    XLA takes CPU buffers from malloc in every call. By default glibc gives large ones back to the system at once, and
    each new one is paid for again, page by page.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return all(mallopt(parameter, value) for parameter, value in _MALLOC.items())


_TELL_SECONDS = 0.2
# Told which step is under way, now and then; set by what started this rank.
tell_step: Callable[[int], object] | None = None
_told = 0.0, -1  # when, which


def note_step(step: int) -> None:
    """A step begins. Of several step functions in turn, the one that has run most counts."""
    global _told
    when, last = _told
    if tell_step is not None and step > last and (now := time.monotonic()) - when >= _TELL_SECONDS:
        _told = now, step
        tell_step(step)


def prepare() -> RankEnvironment | None:
    """Everything a rank needs before jax starts: cores, threads, memory, and the abort hook.

    Under no launcher nothing is changed.
    """
    place = rank_environment()
    if not place.launcher:
        return None
    install_abort_hook()
    pin_cores()
    keep_memory()
    faults.at("import")
    return place


def start_mpi() -> Any:
    """Initialize MPI, for use by any thread at any time; gives the communicator of all ranks."""
    install_abort_hook()
    comm = load_mpi(is_supervised=JOB_VARIABLE in os.environ).COMM_WORLD
    faults.at("init")
    return comm


_installed = False
_own_process = os.getpid()  # exit handlers run in forks as well
_exit_code: int | None = None


def join_job() -> None:
    """Where a launcher has started several ranks: from now on this one fails and ends with them."""
    if rank_environment().size > 1:
        install_abort_hook()


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


def drop_note_of_jax(error: BaseException) -> None:
    """Take out of an error what JAX says behind it, that its own frames are left out: the error has to be last."""
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if "JAX_TRACEBACK_FILTERING" not in note]


def _on_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    drop_note_of_jax(error)
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
    if failing():
        abort(_exit_code or 1)
    if os.getpid() == _own_process and _others_may_wait():
        from bactrian.runtime.control import MpiControl  # imports numpy, which takes the cores that it finds

        lockstep.leave(MpiControl(start_mpi()))


def _others_may_wait() -> bool:
    """Whether other ranks may wait for this one, if only in MPI's start. Slurm's variables alone do not tell: a batch
    script has them too, and MPI can't start there."""
    if rank_environment().size == 1 or importlib.util.find_spec("mpi4py") is None:
        return False
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_finalized():
        return False
    return _mpi_is_up() or rank_environment().launcher != "Slurm"


def note_end_first() -> None:
    """From now on, the end of the program is noted before any exit handler runs that there is by now.

    One of them may wait for the other ranks.
    """
    atexit.unregister(_note_end)
    atexit.register(_note_end)


def _note_end() -> None:
    if not failing():
        lockstep.note(lockstep.ENDED)


def failing() -> bool:
    """Whether this process is on its way out with an error code."""
    return _exit_code not in (None, 0, STOPPED)


def abort(code: int) -> None:
    """End every rank of the job, this one included, now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, absent, or its reader is gone
            stream.flush()
    if _mpi_is_up() and (world := sys.modules["mpi4py.MPI"].COMM_WORLD).size > 1:
        world.Abort(code)
    os._exit(code)


def _mpi_is_up() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized() and not module.Is_finalized()
