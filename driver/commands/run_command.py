"""``bactrian run``: a training script on several ranks, or in this process."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path

from bactrian.driver.commands.argument_types import count, seconds
from bactrian.driver.launch import user_script
from bactrian.passes.frame.errors import ConfigError

SUMMARY = "run a training script, on several ranks or in this process"


_HOSTS = (
    "those of the batch job (as Slurm's), or of a file that a variable names, PRTE_MCA_prte_default_hostfile for "
    "Open MPI and HYDRA_HOST_FILE for MPICH, else this one"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "%(prog)s [-n N] [options] script.py [args ...]"
    parser.epilog = f"Ranks run on the hosts that mpirun finds: {_HOSTS}."
    parser.add_argument(
        "-n", type=count, metavar="N", help="start N ranks with mpirun; without it, all stages run in this process"
    )
    parser.add_argument(
        "--devices",
        type=count,
        metavar="D",
        help="virtual CPU devices of each process (default: 8, and 1 for each of several ranks)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the devices of all ranks (jax.distributed), so that a stage's mesh can have those of several",
    )
    parser.add_argument(
        "--grace",
        type=seconds,
        metavar="S",
        help="seconds that ranks may go on after a signal to stop, which is passed on to them (default: 30)",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write the plan of the script's step as one HTML file; of further steps, files beside it with their names",
    )
    parser.add_argument("--hosts", "--hostfile", metavar="HOSTS", help=argparse.SUPPRESS)
    # One argument: of two, argparse would take a `--` between script and arguments away.
    parser.add_argument(
        "script",
        nargs=argparse.PARSER,
        metavar="script.py",
        help="the Python script, run as __main__, and its own arguments",
    )


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    script, *arguments = options.script[options.script[0] == "--" :]
    user_script.check_script(script, "name a Python file; options of `bactrian run` stand before it, its own after it")
    if options.hosts is not None:
        raise ConfigError(
            "there is no option for hosts yet", why=f"mpirun finds them: {_HOSTS}", fix="leave it out, and name them so"
        )
    if options.distributed and options.n is None:
        raise ConfigError(
            "--distributed joins the devices of several ranks, but there is one process",
            fix="also pass -n N, or give this process as many devices as a mesh needs (--devices)",
        )
    if options.grace is not None and options.n is None:
        raise ConfigError(
            "--grace is for several ranks, but there is one process, which gets signals itself",
            fix="leave it out, or pass -n N",
        )
    if options.report is not None:
        _ask_for_report(Path(options.report).absolute())
    user_script.use_virtual_devices(options.devices or (8 if options.n is None else 1))
    if options.n is not None:
        from bactrian.driver.launch.launcher import GRACE_SECONDS, launch
        from bactrian.driver.progress import TERMINAL_VARIABLE

        if sys.stderr.isatty():
            os.environ[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
        return launch(
            options.n,
            script,
            arguments,
            full=options.traceback,
            distributed=options.distributed,
            grace_seconds=GRACE_SECONDS if options.grace is None else options.grace,
        )
    from bactrian.runtime.rank_lifecycle import exit_code_of

    try:
        user_script.run_script(script, arguments)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed
            sys.stdout.flush()
        sys.stderr.write(user_script.describe_failure(error, script, full=options.traceback))
        return exit_code_of(error)
    return 0


def _ask_for_report(path: Path) -> None:
    """Let the steps of this process, and of the ranks that it starts, leave their reports."""
    from bactrian.driver.report.run_report import PLAN_REPORT_VARIABLE

    if not path.parent.is_dir():
        raise ConfigError(f"cannot write the report {path}: there is no folder {path.parent}", fix="make it first")
    os.environ[PLAN_REPORT_VARIABLE] = str(path)
