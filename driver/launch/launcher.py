"""``bactrian run -n N``: starts the ranks with mpirun, watches them, and says in the end what happened."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bactrian.driver.launch.banners import BannerFilter, GlooFilter
from bactrian.driver.launch.hosts import LOOPBACK, address_for, hosts_of_job
from bactrian.driver.launch.job_end import JobEnd, Loss
from bactrian.driver.launch.mpirun import INSTALL, Mpirun, find_mpirun
from bactrian.driver.launch.output import Relay, is_unread, write
from bactrian.driver.launch.rank_process import (
    COMMAND_VARIABLE,
    DISTRIBUTED_VARIABLE,
    REPORT_VARIABLE,
    TOKEN_BYTES,
    TRACEBACK_VARIABLE,
    UNHEARD,
)
from bactrian.driver.launch.reports import ReportServer
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.rank_lifecycle import JOB_VARIABLE

GRACE_SECONDS = 30.0  # from a stop signal to the end of ranks that are not gone by then, as Slurm has it
_END_SECONDS = 1.5  # from a failure to SIGTERM for what is left, and again to SIGKILL
_POLL_SECONDS = 0.1
_AGAIN_SECONDS = 1.0  # a second Ctrl-C is meant after so long: wrappers may pass on one that we have had
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PASSED = (signal.SIGUSR1, signal.SIGUSR2)
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class Job:
    """One run of a script on several ranks."""

    def __init__(
        self,
        mpirun: Mpirun,
        num_ranks: int,
        script: str,
        arguments: Sequence[str],
        *,
        full: bool = False,
        distributed: bool = False,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._mpirun, self._num_ranks, self._grace_seconds = mpirun, num_ranks, grace_seconds
        self._token = secrets.token_hex(TOKEN_BYTES // 2)
        self._signals: list[int] = []  # that came and were not seen to
        self._stopped, self._stopped_at = 0, 0.0
        self._passed: list[int] = []
        self._deadline: float | None = None
        self._kills = 0
        self._selector = selectors.DefaultSelector()
        host = address_for(hosts_of_job())
        self._reports = ReportServer(host, self._token, num_ranks, self._selector)
        environment = mpirun.settings(several_hosts=host != LOOPBACK) | os.environ
        environment |= {
            JOB_VARIABLE: self._token,
            REPORT_VARIABLE: f"{self._reports.address}:{self._token}",
            COMMAND_VARIABLE: json.dumps([script, *arguments]),
            TRACEBACK_VARIABLE: str(int(full)),
            DISTRIBUTED_VARIABLE: str(int(distributed)),
            "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
        }
        self._process = self._start(environment, pipe_output=distributed)
        assert self._process.stderr is not None
        self._banners = BannerFilter()
        self._errors = Relay(self._process.stderr, 2, self._banners, self._selector, phrase=UNHEARD)
        self._relays = [self._errors]
        if self._process.stdout is not None:
            self._relays.append(Relay(self._process.stdout, 1, GlooFilter(), self._selector))

    def _start(self, environment: Mapping[str, str], *, pipe_output: bool) -> subprocess.Popen[bytes]:
        """Start mpirun. Its command line has nothing of the user's, in which it would find words of its own."""
        exported = sorted(n for n in environment if n.startswith(("BACTRIAN_", "JAX_", "XLA_", "PYTHON")))
        command = self._mpirun.command(self._num_ranks, exported)
        try:
            # A session of its own: Ctrl-C reaches this process alone.
            return subprocess.Popen(
                [*command, sys.executable, "-m", "bactrian.driver.launch.rank_process"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe_output else None,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            raise ConfigError(
                "cannot start the ranks: the script's arguments or the environment are too long",
                why=f"the arguments take {len(environment[COMMAND_VARIABLE])} bytes; 131072 can be passed on in one variable",
                fix="write them into a file, and pass its name",
            ) from None

    def wait(self) -> int:
        """Relay what the ranks print until the last of them is gone, then say what happened; returns the exit code."""
        usual = {
            number: signal.signal(number, self._note)
            for number in (*_STOPS, *_PASSED)
            if signal.getsignal(number) is not signal.SIG_IGN  # by nohup, say
        }
        try:
            while self._process.poll() is None:
                self._attend(_POLL_SECONDS)
                self._heed_signals()
                self._press()
            drained = time.monotonic() + 0.5
            while time.monotonic() < drained and self._attend(0.05):
                pass
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            if self._process.returncode != 0 or self._reports.ends:
                kill_marked(self._token)
            for number, handler in usual.items():
                signal.signal(number, handler)
            self._reports.close()
        for relay in self._relays:
            relay.finish()
        self._selector.close()
        code, text = self._end().told()
        write(2, text.encode(errors="backslashreplace"))
        return code

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._signals.append(number)

    def _heed_signals(self) -> None:
        """Pass on the signals that came. After one to stop, the ranks have their grace to end by themselves."""
        while self._signals:
            number, now = signal.Signals(self._signals.pop(0)), time.monotonic()
            if number in _PASSED:
                self._passed.append(number)
            elif self._stopped:
                if number == signal.SIGINT and now - self._stopped_at > _AGAIN_SECONDS:
                    self._process.kill()
                continue
            else:
                self._stopped, self._stopped_at = number, now
                self._hurry(self._grace_seconds)
                again = "; Ctrl-C again ends them now" if number == signal.SIGINT else ""
                grace = f"{self._grace_seconds:g} s"
                write(2, f"bactrian: passed {number.name} on to the ranks, which have {grace} to end{again}\n".encode())
            self._reports.pass_on(number)

    def _hurry(self, seconds: float) -> None:
        """The ranks must be gone by then."""
        deadline = time.monotonic() + seconds
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline

    def _press(self) -> None:
        """Once a rank has failed or the grace is over, end what is left: first mpirun is asked, then all are killed."""
        if self._reports.ends:
            self._hurry(_END_SECONDS)
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        self._deadline = time.monotonic() + _END_SECONDS
        self._kills += 1
        if self._kills == 1:
            self._process.terminate()
        else:
            kill_marked(self._token)
            self._process.kill()

    def _attend(self, timeout: float) -> bool:
        """Handle what has arrived; false if nothing had."""
        events = self._selector.select(timeout)
        for key, _ in events:
            key.data()
        self._reports.release()
        if not events:
            write(2, self._banners.release())
        return bool(events)

    def _end(self) -> JobEnd:
        code, ends = self._process.returncode, self._reports.ends
        if (
            self._mpirun.flavour == "mpich"
            and ends
            and isinstance(ends[0], Loss)
            and code in (*_CRASHES, *_STOPS, *_PASSED)
        ):
            code += 128  # MPICH gives a signal's bare number
        return JobEnd(
            num_ranks=self._num_ranks,
            num_reported=self._reports.num_reported,
            code=code,
            ends=ends,
            codes=self._reports.codes,
            stopped=self._stopped,
            passed=self._passed,
            forced=self._kills > 0,
            unheard=self._errors.found,
            unread=self._process.stdout is None and is_unread(1),
            banners=self._banners.dropped.decode(errors="replace"),
        )


def launch(
    num_ranks: int,
    script: str,
    arguments: Sequence[str],
    *,
    full: bool = False,
    distributed: bool = False,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run the script on so many ranks; returns the exit code of the job.

    Args:
        num_ranks: how many.
        script: its path.
        arguments: its own.
        full: whether users' errors are printed with a traceback too.
        distributed: whether the ranks' devices are joined.
        grace_seconds: how long ranks may go on after a signal to stop.

    Raises:
        ConfigError: no mpirun or no mpi4py, or what they are to be given is too much.
    """
    mpirun = find_mpirun()
    if importlib.util.find_spec("mpi4py") is None:
        raise ConfigError("cannot start several ranks: mpi4py is not installed", fix=f"`{INSTALL}`")
    sys.stdout.flush()
    job = Job(mpirun, num_ranks, script, arguments, full=full, distributed=distributed, grace_seconds=grace_seconds)
    return job.wait()


def kill_marked(token: str) -> None:
    """Kill the processes of this machine that carry the job's mark in their environment."""
    mark = f"{JOB_VARIABLE}={token}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # gone, or another user's


_LIBC: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_us() -> None:
    """In mpirun before it starts: be told to stop when the launcher dies, however that happens."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGTERM)
