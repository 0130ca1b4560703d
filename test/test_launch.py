"""Jobs of several ranks: how they end, how soon, what stands last, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20.0  # a slow machine may take so long to start the ranks
END_SECONDS = 5.0

# argv: failing rank, point. Prints the time of the failure; the other ranks wait for ever.
SCRIPT = """
import os, signal, sys, time
rank, point = int(sys.argv[1]), sys.argv[2]
def fail(here):
    if here == point and rank == int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))):
        print("failed at", time.time(), flush=True)
        raise ValueError("boom at " + point)
fail("import")
from mpi4py import MPI
import atexit
world = MPI.COMM_WORLD
me = world.rank
print("rank", me, "of", world.size, "cores", sorted(os.sched_getaffinity(0)), flush=True)
atexit.register(fail, "exit")
for step in range(3):
    if step == 1:
        fail("step")
        if me == rank and point == "thread":
            import threading
            print("failed at", time.time(), flush=True)
            threading.Thread(target=lambda: [].pop()).start()
        if me == rank and point == "kill":
            print("failed at", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if me == rank and point in ("code", "message", "os_exit", "os_exit0"):
            print("failed at", time.time(), flush=True)
            if point.startswith("os_exit"):
                os._exit(0 if point == "os_exit0" else 3)
            sys.exit(7 if point == "code" else "no data")
        if me == rank and point == "config":
            from bactrian.passes.frame.errors import InfeasiblePlanError
            raise InfeasiblePlanError("cannot place stage 3", fix="use more devices")
        if point == "stop":
            print("failed at", time.time(), flush=True)
            sys.exit(75)
        if me == rank and point == "fork_kill":
            if os.fork() == 0:
                time.sleep(600)  # it has the rank's files, and outlives it
            print("failed at", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if me == rank and point == "abort":
            print("failed at", time.time(), flush=True)
            world.Abort(9)
        if point == "hang":
            print("ready", flush=True)
            time.sleep(600)
    world.Barrier()
print("rank", me, "done", flush=True)
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str
    seconds: float  # from the failure to the end of the command, if the script said when it failed
    survivors: list[int]
    ended_at: float = 0.0

    @property
    def last(self) -> str:
        return self.err.rstrip().splitlines()[-1] if self.err.strip() else ""


def marked(mark: str) -> list[int]:
    """The processes that carry the mark in their environment."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Command:
    """``bactrian run`` as a child process with a mark of its own."""

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        n: int | None = 2,
        script: str | Path = SCRIPT,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.mark = uuid.uuid4().hex
        path = script if isinstance(script, Path) else tmp_path / "train.py"
        if isinstance(script, str):
            path.write_text(script)
        ranks = () if n is None else ("-n", str(n))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "bactrian.driver.cli", "run", *ranks, *options, str(path), *arguments],
            env=os.environ | {"TEST_MARK": self.mark, "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, since: float | None = None, start_seconds: float = START_SECONDS) -> Ended:
        try:
            out, err = self.process.communicate(timeout=start_seconds + END_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in marked(self.mark):
                os.kill(pid, signal.SIGKILL)
            pytest.fail("the job did not end")
        now = time.time()
        for line in out.splitlines():
            if "failed at" in line:
                since = since or float(line.split("failed at")[1].split()[0])
        return Ended(self.process.returncode, out, err, now - since if since else 0.0, marked(self.mark), now)

    def wait_ready(self, count: int) -> None:
        """Read stdout until so many ranks said that they are ready."""
        assert self.process.stdout is not None
        while count and (line := self.process.stdout.readline()):
            count -= "ready" in line
        assert count == 0


@pytest.mark.mpi
def test_a_job_that_ends_well(tmp_path: Path) -> None:
    job = Command(tmp_path, "-1", "none", n=3).ended()
    assert (job.code, job.err, job.survivors) == (0, "", [])
    assert job.out.count("done") == 3
    assert "rank 2 of 3" in job.out


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("rank", "point"),
    [
        (0, "import"),
        (1, "step"),
        (0, "exit"),
        *(
            pytest.param(rank, point, marks=pytest.mark.long)
            for rank, point in ((1, "import"), (0, "step"), (1, "exit"))
        ),
    ],
)
def test_an_exception_ends_the_job_with_its_traceback_last(tmp_path: Path, rank: int, point: str) -> None:
    check_exception(tmp_path, rank, point)


@pytest.mark.mpi
@pytest.mark.long
@pytest.mark.parametrize("run", range(200))
def test_an_exception_ends_the_job_every_time(tmp_path: Path, run: int) -> None:
    check_exception(tmp_path, run % 4, ("import", "step", "exit")[run // 4 % 3], n=4)


def check_exception(tmp_path: Path, rank: int, point: str, n: int = 2) -> None:
    job = Command(tmp_path, str(rank), point, n=n).ended()
    assert job.code == 1
    assert job.last == f"ValueError: boom at {point}"
    assert f"rank {rank} on " in job.err and "train.py" in job.err and "runpy" not in job.err
    assert "MPI_ABORT" not in job.err and "prterun" not in job.err
    assert job.seconds <= END_SECONDS
    assert job.survivors == []


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("point", "code", "last"),
    [
        ("kill", 6, "killed by signal 9 (SIGKILL); the other ranks were ended"),
        ("fork_kill", 6, "; the other ranks were ended"),
        ("code", 7, "called sys.exit(7)"),
        ("message", 1, "no data"),
        ("os_exit", 3, "called os._exit(3)"),
        ("os_exit0", 6, "called os._exit(0)"),
        ("abort", 9, "called MPI_Abort with 9"),
        ("config", 4, "  where: "),
        ("thread", 1, "IndexError: pop from empty list"),
        ("stop", 75, ""),
    ],
)
def test_other_ends(tmp_path: Path, point: str, code: int, last: str) -> None:
    job = Command(tmp_path, "1", point).ended()
    assert job.code == code, job.err
    assert last in job.last
    if point == "kill":
        assert f"lost rank 1 on {os.uname().nodename} (process " in job.err
    if point == "config":
        assert "error: cannot place stage 3\n  fix: use more devices\n" in job.err and "Traceback" not in job.err
    assert job.seconds <= (3.0 if point == "kill" else END_SECONDS)
    assert job.survivors == []


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    command = Command(tmp_path, "-1", "hang")
    command.wait_ready(2)
    since = time.time()
    command.process.send_signal(number)
    job = command.ended(since)
    assert job.seconds <= END_SECONDS
    if number == signal.SIGKILL:  # nobody is left to wait for them: they end by themselves
        deadline = time.time() + END_SECONDS
        while marked(command.mark) and time.time() < deadline:
            time.sleep(0.1)
        assert marked(command.mark) == []
    else:
        assert job.code == 128 + number
        assert job.last == f"bactrian: stopped by {number.name}: all 2 ranks were ended"
        assert job.survivors == []


# argv: what a rank does once it is told, and for how long. Ranks wait together, and leave with 75.
STOPPING = """
import os, signal, sys, time
from mpi4py import MPI
told = []
for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(signal.Signals[name], lambda number, frame: told.append(signal.Signals(number).name))
world = MPI.COMM_WORLD
print("ready", flush=True)
while not world.allreduce(len(told), MPI.MIN):
    time.sleep(0.02)
print("rank", world.rank, "told", *told, flush=True)
time.sleep(float(sys.argv[1]) * world.rank)
print("rank", world.rank, "saved", flush=True)
sys.exit(75)
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGUSR2, signal.SIGHUP)),
    ],
)
def test_signals_reach_the_script_which_leaves_in_its_own_time(tmp_path: Path, number: signal.Signals) -> None:
    command = Command(tmp_path, "0.5", script=STOPPING)
    command.wait_ready(2)
    command.process.send_signal(number)
    job = command.ended()
    assert job.code == 75, job.err
    assert job.out.count(f"told {number.name}") == job.out.count("saved") == 2
    passes = number in (signal.SIGTERM, signal.SIGHUP)
    said = f"bactrian: passed {number.name} on to the ranks, which have 30 s to end\n"
    assert job.err == (said if passes else "")
    assert job.survivors == []


@pytest.mark.mpi
def test_ranks_that_outlast_their_grace_are_ended(tmp_path: Path) -> None:
    command = Command(tmp_path, "60", script=STOPPING, options=["--grace", "0.5"])
    command.wait_ready(2)
    since = time.time()
    command.process.send_signal(signal.SIGTERM)
    job = command.ended(since)
    assert (job.code, job.last) == (143, "bactrian: stopped by SIGTERM: all 2 ranks were ended")
    assert job.out.count("told SIGTERM") == 2 and job.out.count("saved") == 1
    assert job.seconds <= END_SECONDS
    assert job.survivors == []


@pytest.mark.mpi
@pytest.mark.long
def test_jax_leaves_the_signal_alone_that_ends_ranks(tmp_path: Path) -> None:
    script = "import time; print('ready', flush=True); time.sleep(600)"
    command = Command(tmp_path, script=script, options=["--distributed"])
    command.wait_ready(2)
    since = time.time()
    command.process.send_signal(signal.SIGTERM)
    job = command.ended(since)
    assert (job.code, job.last) == (143, "bactrian: stopped by SIGTERM: all 2 ranks were ended")
    assert job.seconds <= END_SECONDS
    assert job.survivors == []


@pytest.mark.mpi
def test_ctrl_c_in_a_callback_is_not_lost(tmp_path: Path) -> None:
    script = """
import gc, time

def callback(*_):
    gc.callbacks.clear()
    print("ready", flush=True)
    time.sleep(20)

gc.callbacks.append(callback)
gc.collect()
time.sleep(20)
"""
    command = Command(tmp_path, script=script)
    command.wait_ready(2)
    command.process.send_signal(signal.SIGINT)
    job = command.ended()
    assert (job.code, job.last) == (130, "bactrian: stopped by SIGINT: all 2 ranks were ended")
    assert "ignored" not in job.err and "Traceback" not in job.err


UNREACHABLE = """
import sys
from bactrian.driver.launch import launcher

class Unreachable(launcher.ReportServer):  # ranks are told another port
    def __init__(self, host, *rest):
        super().__init__(host, *rest)
        self.address = f"{host}:1"

launcher.ReportServer = Unreachable
sys.exit(launcher.launch(2, sys.argv[1], []))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("code", [0, 5])
def test_ranks_that_cannot_report_run_all_the_same(tmp_path: Path, code: int) -> None:
    script, launch = tmp_path / "train.py", tmp_path / "launch.py"
    script.write_text(f"import sys; print('trained', flush=True); sys.exit({code})")
    launch.write_text(UNREACHABLE)
    job = subprocess.run([sys.executable, str(launch), str(script)], capture_output=True, text=True, timeout=25)
    assert job.returncode == code
    assert "trained" in job.stdout and "cannot report to bactrian run at 127.0.0.1:1 (" in job.stderr
    said = f"error: mpirun ended with exit code {code}; its ranks did run, but could not report here."
    assert (said in job.stderr) == (code != 0)


@pytest.mark.mpi
def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    script = "import time; print('ready', flush=True); time.sleep(0.5); print('done')"
    command = Command(tmp_path, script=script, prefix=["nohup"])
    command.wait_ready(2)
    command.process.send_signal(signal.SIGHUP)
    job = command.ended()
    assert (job.code, job.out.count("done")) == (0, 2), job.err


@pytest.mark.mpi
@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise ValueError", 1)])
def test_a_job_goes_on_without_a_reader_of_its_errors(tmp_path: Path, end: str, code: int) -> None:
    script = "import sys, time\nfor i in range(20): print('x' * 4096, file=sys.stderr); time.sleep(0.02)\n"
    command = Command(tmp_path, script=f"{script}print('done', flush=True)\n{end}\n")
    assert command.process.stderr is not None
    command.process.stderr.close()
    job = command.ended()
    assert (job.code, "done" in job.out) == (code, True)
    assert job.survivors == []


@pytest.mark.mpi
def test_without_a_reader_of_its_output_a_job_ends_for_that(tmp_path: Path) -> None:
    command = Command(tmp_path, script="while True: print('x' * 4096)")
    assert command.process.stdout is not None
    command.process.stdout.close()
    job = command.ended()
    assert (job.code, job.last) == (
        141,
        "bactrian: nobody reads the ranks' output any more; mpirun ended them for that",
    )
    assert job.survivors == []


@pytest.mark.mpi
def test_arguments_are_the_scripts_alone(tmp_path: Path) -> None:
    arguments = [
        "--",
        "a",
        ":",
        "-n",
        "1",
        "/bin/echo",
        "injected",
        "--",
        "",
        "$x;y=1",
        'é"q',
        "two\nlines",
        "@file",
        "-x",
    ]
    names = ["BACTRIAN_COMMAND", "JAX_ENABLE_PREEMPTION_SERVICE"]
    script = f"import json, os, sys; print(json.dumps([sys.argv[1:], *map(os.environ.get, {names})]), flush=True)"
    job = Command(tmp_path, *arguments, n=1, script=script).ended()
    assert (job.code, job.err) == (0, "")
    assert json.loads(job.out) == [arguments, None, "false"]


@pytest.mark.mpi
def test_arguments_that_are_too_long(tmp_path: Path) -> None:
    job = Command(tmp_path, *(["x" * 1000] * 200), script="raise SystemExit('must not run')").ended()
    assert job.code == 3
    assert job.err.startswith("error: cannot start the ranks: the script's arguments or the environment are too long\n")
    assert "fix: write them into a file" in job.err and len(job.err) < 1000


# Prints the ports on which this rank listens, other than on the loopback.
PORTS = """
import os, pathlib
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
links = [os.readlink(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{entry}")]
ports = []
for name in ("tcp", "tcp6"):
    for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in links and not local.startswith("0100007F:"):
            ports.append(local)
print("ports", *ports, flush=True)
"""


@pytest.mark.mpi
def test_ranks_of_one_host_open_no_port(tmp_path: Path) -> None:
    job = Command(tmp_path, script=PORTS).ended()
    assert (job.code, job.out) == (0, "ports\nports\n"), job.err
    job = Command(tmp_path, script=PORTS, OMPI_MCA_btl="self,sm,tcp").ended()  # whoever wants them can have them
    assert job.code == 0 and job.out.count("ports ") == 2, job.out


@pytest.mark.mpi
def test_strangers_at_the_port_do_not_disturb_a_job(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '0': print('ready', os.environ['BACTRIAN_REPORT'], flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "sys.exit(75)\n"
    )
    command = Command(tmp_path, str(tmp_path / "go"), script=script)
    assert command.process.stdout is not None
    host, port, token = command.process.stdout.readline().split()[1].split(":")
    sent = [b"", b"[" * 100_000, b'{"kind": "failed"}\n', token[:-1].encode() + b"\n", b"\0" * 5000] * 20
    with contextlib.ExitStack() as strangers:
        for data in sent:
            connection = strangers.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):  # it closes those who talk
                connection.sendall(data)
        (tmp_path / "go").touch()
        job = command.ended()
    assert (job.code, job.err) == (75, "")


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_one_process_without_n(tmp_path: Path, dashes: list[str]) -> None:
    script = "import json, os, sys\nprint(json.dumps([__name__, sys.argv[1:], os.environ['XLA_FLAGS'], sys.path[0]]))"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = tmp_path / "train.py"
    path.write_text(script)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "bactrian.driver.cli",
            "run",
            "--devices",
            "3",
            *dashes,
            str(path),
            "--",
            "-n",
            "x",
            "--",
        ],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    flags = "--xla_force_host_platform_device_count=3"
    assert json.loads(run.stdout) == ["__main__", ["--", "-n", "x", "--"], flags, str(tmp_path)]
