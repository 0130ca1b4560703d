"""One rank of ``bactrian run -n N``: takes its cores, runs the script, and tells the launcher how it ended.

The launcher starts ``python -m bactrian.driver.launch.rank_process`` under mpirun, with the script and its arguments in a
variable. A rank talks to it over one TCP connection: first the job's token, then one JSON record per line: ``started``,
now and then ``step``, then ``failed``, ``exited`` (by `os._exit`) or ``done``. A connection that closes without one of
those is a lost rank. What comes back are bytes: the numbers of signals for the script's own handlers, and `RELEASE`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from bactrian.driver.launch.user_script import describe_failure, exit_status, run_script
from bactrian.runtime import rank_lifecycle
from bactrian.runtime.rank_lifecycle import STOPPED, abort, exit_code_of, prepare, rank_environment

COMMAND_VARIABLE = "BACTRIAN_COMMAND"  # JSON: the script and its arguments
REPORT_VARIABLE = "BACTRIAN_REPORT"  # host:port:token of the launcher
TOKEN_BYTES = 32
DISTRIBUTED_VARIABLE = "BACTRIAN_DISTRIBUTED"  # "1": jax.distributed joins the ranks before the script runs
TRACEBACK_VARIABLE = "BACTRIAN_TRACEBACK"  # "1": tracebacks for users' errors too
UNHEARD = b"cannot report to bactrian run at "  # the launcher looks for it
RELEASE = 0  # comes where signals do: the launcher knows of the failure, and the job may be aborted
_RELEASE_SECONDS = 1.0  # to wait for that at most
_AGAIN_SECONDS = 0.05  # until a Ctrl-C that nobody got is sent again
_MOST_CHARACTERS = 100_000  # of a failure's text
_CONNECT_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_LOST_SECONDS = 3.0  # in which mpirun ends a job that has lost a rank

_leave = os._exit  # which a reporter replaces


class Reporter:
    """The connection to the launcher; without one, failures go to stderr."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._released = threading.Event()
        self.closed = False
        host, port, token = os.environ[REPORT_VARIABLE].rsplit(":", 2)
        place, name = rank_environment(), socket.gethostname()
        try:
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
            connection.sendall(token.encode())
        except OSError as error:
            who = f"bactrian: rank {place.rank} on {name} (process {os.getpid()})"
            text = f"{who} {UNHEARD.decode()}{host}:{port} ({error}); it runs all the same\n"
            sys.stderr.write(text)
            return
        self._socket = connection
        os.register_at_fork(after_in_child=connection.close)  # a child is not this rank, and may outlive it
        self.send(kind="started", rank=place.rank, host=name, pid=os.getpid())
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()
        os._exit = self._exit

    @property
    def connected(self) -> bool:
        """Whether the launcher could be reached."""
        return self._socket is not None

    def _listen(self, connection: socket.socket) -> None:
        """Give the main thread the signals that the launcher was sent, and note its leave to abort."""
        main = threading.main_thread().ident
        assert main is not None
        while True:
            try:
                number = connection.recv(1)
            except TimeoutError:
                continue
            except OSError:
                return
            if not number:
                return
            if number[0] == RELEASE:
                self._released.set()
            else:
                signal.pthread_kill(main, number[0])

    def _exit(self, status: int) -> NoReturn:
        """`os._exit` that tells the launcher first, which can't know it from a kill otherwise."""
        self.send(kind="exited", code=status & 0xFF)
        _leave(status)

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
            with contextlib.suppress(OSError, ValueError, AttributeError):  # its reader is gone, closed, or absent
                stream.flush()
        if len(text) > _MOST_CHARACTERS:
            text = f"... ({len(text) - _MOST_CHARACTERS} characters before)\n{text[-_MOST_CHARACTERS:]}"
        if self.send(kind="failed", code=code, text=text):
            self._released.wait(_RELEASE_SECONDS)
        else:
            sys.stderr.write(text)
        abort(code)

    def done(self, code: int) -> None:
        """Tell that this rank ended by itself."""
        if not self.closed:
            self.send(kind="done", code=code)


def main() -> None:
    """Run the script that the launcher names."""
    script, *arguments = json.loads(os.environ.pop(COMMAND_VARIABLE))
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")  # else jax.distributed takes SIGTERM for itself
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
        if codes[0] == 0 or not reporter.connected:
            raise
        # The launcher is told of the code. To mpirun it would be a failure, for which it ends ranks that still save.
    except BaseException as error:
        _leave_it_to_the_lost(error)
        reporter.fail(exit_code_of(error), describe_failure(error, script, full=_full()))


def _full() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE) == "1"


def _fail_elsewhere(reporter: Reporter, script: str) -> None:
    """An exception on another thread or in an exit handler ends the job too, and a Ctrl-C that a callback swallowed comes
    again; Python alone would go on."""
    usual = sys.unraisablehook

    def fail(error: BaseException) -> None:
        _leave_it_to_the_lost(error)
        reporter.fail(exit_code_of(error), describe_failure(error, script, full=_full()))

    def on_unraisable(unraisable: Any) -> None:
        if "atexit" in (unraisable.err_msg or "") and unraisable.exc_value is not None:
            fail(unraisable.exc_value)
        if isinstance(unraisable.exc_value, KeyboardInterrupt):  # it came in a callback, say JAX's at a collection
            threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            return
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
