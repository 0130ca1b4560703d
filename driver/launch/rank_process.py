"""One rank of ``bactrian run -n N``: takes its cores, runs the script, and tells the launcher how it ended.

The launcher starts ``python -m bactrian.driver.launch.rank_process script.py args...`` under mpirun. A rank talks to it over one TCP
connection, one JSON record per line: ``started``, now and then ``step``, then ``failed`` or ``done``. A connection that
closes without one of the last two is a lost rank.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from bactrian.driver.launch.user_script import describe_failure, exit_status, run_script
from bactrian.runtime import rank_lifecycle
from bactrian.runtime.rank_lifecycle import STOPPED, abort, exit_code_of, prepare, rank_environment

REPORT_VARIABLE = "BACTRIAN_REPORT"  # host:port:token of the launcher
DISTRIBUTED_VARIABLE = "BACTRIAN_DISTRIBUTED"  # "1": jax.distributed joins the ranks before the script runs
TRACEBACK_VARIABLE = "BACTRIAN_TRACEBACK"  # "1": tracebacks for users' errors too
_PR_SET_PDEATHSIG = 1
_LOST_SECONDS = 3.0  # in which mpirun ends a job that has lost a rank


class Reporter:
    """The connection to the launcher; without one, failures go to stderr."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self.closed = False
        address = os.environ.get(REPORT_VARIABLE)
        if address:
            host, port, token = address.rsplit(":", 2)
            try:
                self._socket = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                return
            place = rank_environment()
            self.send(kind="started", token=token, rank=place.rank, host=socket.gethostname(), pid=os.getpid())

    def send(self, **record: Any) -> bool:
        """Send one record; false if it could not be sent."""
        if self._socket is None:
            return False
        try:
            self._socket.sendall(json.dumps(record).encode() + b"\n")
        except OSError:
            return False
        return True

    def fail(self, code: int, text: str) -> None:
        """Tell why this rank ends the job, and end it."""
        self.closed = True
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if not self.send(kind="failed", code=code, text=text):
            sys.stderr.write(text)
        abort(code)

    def done(self, code: int) -> None:
        """Tell that this rank ended by itself."""
        if not self.closed:
            self.send(kind="done", code=code)


def main() -> None:
    """Run ``sys.argv[1]`` with the arguments after it."""
    script, arguments = sys.argv[1], sys.argv[2:]
    _die_with_launcher()
    faulthandler.enable()
    reporter = Reporter()
    codes = [0]
    atexit.register(lambda: reporter.done(codes[0]))  # first in, so last out
    rank_lifecycle.tell_step = lambda step: reporter.send(kind="step", step=step)
    try:
        prepare()
        _fail_elsewhere(reporter, script)
        if os.environ.get(DISTRIBUTED_VARIABLE) == "1":
            from bactrian.driver.run.distributed_meshes import join_ranks  # starts jax's import
            from bactrian.runtime.control import MpiControl

            join_ranks(MpiControl(rank_lifecycle.start_mpi()))
        run_script(script, arguments)
    except SystemExit as error:
        codes[0], text = exit_status(error)
        if codes[0] not in (0, STOPPED):
            reporter.fail(codes[0], text)
        raise
    except BaseException as error:
        _leave_it_to_the_lost(error)
        reporter.fail(exit_code_of(error), describe_failure(error, script, full=_full()))


def _full() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE) == "1"


def _fail_elsewhere(reporter: Reporter, script: str) -> None:
    """An exception on another thread or in an exit handler ends the job too; Python alone would go on."""
    usual = sys.unraisablehook

    def fail(error: BaseException) -> None:
        _leave_it_to_the_lost(error)
        reporter.fail(exit_code_of(error), describe_failure(error, script, full=_full()))

    def on_unraisable(unraisable: Any) -> None:
        if "atexit" in (unraisable.err_msg or "") and unraisable.exc_value is not None:
            fail(unraisable.exc_value)
        usual(unraisable)

    def on_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            fail(args.exc_value)

    sys.unraisablehook = on_unraisable
    threading.excepthook = on_thread


def _leave_it_to_the_lost(error: BaseException) -> None:
    """Where ranks compute together, one that is lost makes the calls of others fail: mpirun notices it by itself, ends
    the job, and the launcher names it. An error of this rank's own is told a little later for that."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized():
        time.sleep(_LOST_SECONDS)


def _die_with_launcher() -> None:
    """Ask Linux to kill this rank when the process that started it dies."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(6)


if __name__ == "__main__":
    main()
