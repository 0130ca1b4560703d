"""The ``bactrian`` command. A subcommand is a file of ``commands/``, which imports what is heavy when it runs."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from bactrian import __version__
from bactrian.driver.commands import (
    diff_command,
    doctor_command,
    explain_command,
    plan_command,
    profile_command,
    run_command,
    solve_command,
)
from bactrian.driver.launch.user_script import exit_status, is_user_error
from bactrian.driver.report.terminal import drop_output, why_output_fails
from bactrian.passes.frame.errors import BactrianError, ConfigError

_COMMANDS = {
    "run": run_command,
    "plan": plan_command,
    "explain": explain_command,
    "diff": diff_command,
    "solve": solve_command,
    "profile-cluster": profile_command,
    "doctor": doctor_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 fine, 1 our bug, 2 usage, 3 program or configuration, 4 infeasible,
    5 pass failure, 6 peer lost."""
    options = parser().parse_args(arguments)
    try:
        code = options.command(options)
        sys.stdout.flush()
        return code
    except SystemExit as error:
        code, text = exit_status(error)
        sys.stderr.write(text)
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\nbactrian: stopped by SIGINT\n")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        drop_output()
        return 0
    except OSError:
        if not (why := why_output_fails()):
            raise
        sys.stderr.write(f"error: cannot write standard output\n  why: {why}\n")
        return ConfigError.exit_code
    except BactrianError as error:
        if options.traceback or not is_user_error(error):
            traceback.print_exc()
        else:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="print the Python traceback of every error")
    made = argparse.ArgumentParser(prog="bactrian", description="Run a JAX train step as a pipeline over a cluster.")
    made.add_argument("--version", action="version", version=f"bactrian {__version__}")
    commands = made.add_subparsers(metavar="command", required=True)
    for name, command in _COMMANDS.items():
        summary = command.SUMMARY
        description = summary[0].upper() + summary[1:] + "."
        added = commands.add_parser(name, help=summary, description=description, parents=[common])
        command.add_arguments(added)
        added.set_defaults(command=command.run)
    return made


if __name__ == "__main__":
    sys.exit(main())
