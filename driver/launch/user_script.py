"""Running a user's script as ``__main__``, and saying what went wrong in it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bactrian.passes.frame.errors import BactrianError, ConfigError, PassError
from bactrian.runtime.rank_lifecycle import drop_note_of_jax


def check_script(script: str, fix: str) -> None:
    """Refuse a script that isn't there.

    Args:
        script: its path.
        fix: how the command at hand wants it named.

    Raises:
        ConfigError: no such file.
    """
    if not Path(script).is_file():
        raise ConfigError(f"no such script: {script}", fix=fix)


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run the script in this process as ``python script arguments...`` would."""
    sys.argv = [script, *arguments]
    sys.path[0:1] = [str(Path(script).resolve().parent)]
    runpy.run_path(script, run_name="__main__")


def describe_failure(error: BaseException, script: str, *, full: bool = False) -> str:
    """The text of an error of the script: for a user's error its message and the script's line, else the traceback.

    The traceback begins at the script if that is in it (an exit handler's is not); ``full`` gives all of it for every
    error.
    """
    drop_note_of_jax(error)
    frames = _from_script(error.__traceback__, script)
    if full or not is_user_error(error):
        if frames is None and not isinstance(error, SyntaxError):
            full = True
        return "".join(traceback.format_exception(type(error), error, error.__traceback__ if full else frames))
    text = f"error: {error}\n"
    if isinstance(error, BactrianError) and not error.where and frames is not None:
        own = [frame for frame in traceback.extract_tb(frames) if _same_file(frame.filename, script)]
        text += f"  where: {own[-1].filename}:{own[-1].lineno}\n"
    return text


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do: our own errors, but for a failed pass."""
    return isinstance(error, BactrianError) and not isinstance(error, PassError) and error.exit_code != 1


def exit_status(error: SystemExit) -> tuple[int, str]:
    """The code and the message of a ``sys.exit``, as Python reads them."""
    if error.code is None:
        return 0, ""
    return (error.code & 0xFF, "") if isinstance(error.code, int) else (1, f"{error.code}\n")


def use_virtual_devices(count: int) -> None:
    """Give jax that many CPU devices, unless XLA_FLAGS already says how many. Call it before jax starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()


def _from_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    while trace is not None and not _same_file(trace.tb_frame.f_code.co_filename, script):
        trace = trace.tb_next
    return trace


def _same_file(a: str, b: str) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)
