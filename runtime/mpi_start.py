"""The start of MPI: ranks that wait in it for one that has left must not wait for ever.

Open MPI's mpirun ends all ranks as soon as one has failed. MPICH's mpiexec does so only once that rank has started MPI:
before, the others wait in ``MPI_Init``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_RANK, _LOCAL_RANK, _LOCAL_SIZE = "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
_PERIOD = 0.2  # seconds between two looks; one who is missing in two of them has left


def load_mpi(is_supervised: bool) -> Any:
    """The module ``mpi4py.MPI``, with MPI started for use by any thread.

    Under a bare mpiexec of MPICH this rank ends with an error where a rank of its host has left before MPI has started.

    Args:
        is_supervised: whether somebody else ends the ranks then.

    Raises:
        ImportError: mpi4py is not there, or finds no MPI.
    """
    launcher = launcher_process() if _LOCAL_SIZE in os.environ and not is_supervised else None
    if launcher is None or "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        return MPI
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    started = threading.Event()
    size = int(os.environ[_LOCAL_SIZE])
    threading.Thread(target=watch_ranks, args=(launcher, size, started), daemon=True, name="mpi-start").start()
    try:
        # By way of ctypes, since mpi4py holds the interpreter's lock in this call.
        ctypes.CDLL(MPI.__file__).MPI_Init_thread(None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(ctypes.c_int()))
    finally:
        started.set()
    return MPI


def launcher_process() -> int | None:
    """The process that has started the ranks of this host: the nearest ancestor that is no rank; None if it can't be seen."""
    process = os.getpid()
    try:
        while _RANK in _environment(process):
            process = _parent(process)
        _children(process)
    except OSError:
        return None
    return process


def missing_ranks(launcher: int, local_size: int) -> list[int]:
    """The local numbers of the ranks of this host that have ended, or that the launcher has not started yet."""
    there: set[int] = set()
    for child in _children(launcher):
        try:
            there.add(int(_environment(child).get(_LOCAL_RANK, -1)))  # one that has ended has none
        except OSError:
            continue
    return sorted(set(range(local_size)) - there)


def watch_ranks(launcher: int, local_size: int, started: threading.Event) -> None:
    """End this rank if another one of its host has left, until MPI has started."""
    before: list[int] = []
    while not started.wait(_PERIOD):
        try:
            missing = missing_ranks(launcher, local_size)
        except OSError:
            return
        gone = [rank for rank in missing if rank in before]
        if gone and not started.is_set():
            _end(gone, local_size)
        before = missing


def _end(gone: list[int], local_size: int) -> None:
    """End this rank by a signal, for which mpiexec ends those of all hosts."""
    who = f"process{'es' * (len(gone) > 1)} {', '.join(map(str, gone))} of the {local_size} on {socket.gethostname()}"
    print(
        f"error: {who} ended before MPI started\n"
        f"  where: rank {os.environ[_RANK]}, which waited for it\n"
        "  why: MPICH's mpiexec lets the other ranks wait for ever\n"
        "  fix: see what that process wrote before it ended",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGKILL)


def _children(process: int) -> list[int]:
    return [int(child) for child in (_PROC / f"{process}/task/{process}/children").read_text().split()]


def _parent(process: int) -> int:
    # The name of the command, which may hold spaces, is in brackets; the state and the parent follow.
    return int((_PROC / f"{process}/stat").read_text().rpartition(")")[2].split()[1])


def _environment(process: int) -> dict[str, str]:
    """The variables that a process was started with; none of one that has ended."""
    entries = (_PROC / f"{process}/environ").read_bytes().split(b"\0")
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}
