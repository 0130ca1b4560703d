"""The user's file and line, for errors: from the stack, from an exception, or from an equation of a jaxpr."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import jax.extend.source_info_util
import jaxlib


class Frame(NamedTuple):
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


def _package_directory(file: str | None) -> str:
    return os.path.dirname(os.path.abspath(file or "")) + os.sep


# Our own folders lie beside each other, in an installed package as in a checkout.
_OURS = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name) + os.sep
    for name in ("driver", "passes", "runtime")
)
_COMMANDS = sysconfig.get_path("scripts") + os.sep  # where the file of the command `bactrian` is
_NEVER_THE_USER = (*_OURS, _COMMANDS, _package_directory(jax.__file__), _package_directory(jaxlib.__file__))
_STDLIB = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
_PACKAGES = re.compile(r"[\\/](site|dist)-packages[\\/]")  # of this interpreter, the user or the system

# JAX then blames the user's call of `bactrian.grad`, not our frame inside it, in every MLIR location.
jax.extend.source_info_util.register_exclusion(_package_directory(__file__))


def user_line(frames: Iterable[Frame]) -> str:
    """The innermost frame of the user's own code; else of a library that is not JAX; else nothing.

    Args:
        frames: innermost first.
    """
    fallback = ""
    for frame in frames:
        if frame.file.startswith(_NEVER_THE_USER) or frame.file.startswith("<"):
            continue
        if not frame.file.startswith(_STDLIB) and not _PACKAGES.search(frame.file):
            return str(frame)
        fallback = fallback or str(frame)
    return fallback


def line_here() -> str:
    """The user's line that is calling us now."""
    own = inspect.currentframe()
    return user_line(_stack(own and own.f_back))


def line_of_main_thread() -> str:
    """The user's line that the main thread is at, for other threads to ask."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    return user_line(_stack(frames.get(threading.main_thread().ident or 0)))


def line_of_error(error: BaseException) -> str:
    """The user's line that raised ``error``."""
    frames = list(_traceback(error.__traceback__))
    return user_line(reversed(frames))


def line_of_function(function: Callable[..., Any]) -> Frame | None:
    """Where a function begins, below what wraps it; None for one that is not written in Python."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    for each in (function, type(function).__call__):  # of an object that can be called, its class has the code
        code = getattr(each, "__code__", None)
        if code is not None:
            return Frame(code.co_filename, code.co_firstlineno, code.co_name)
    return None


def line_of_equation(equation: Any, callers: Iterable[Any] = ()) -> str:
    """The user's line and the name stack of an equation of a jaxpr.

    Args:
        equation: an equation.
        callers: the equations whose nested jaxprs it stands in, innermost first; JAX cuts stacks there.
    """
    infos = [each.source_info for each in (equation, *callers)]
    frames = [frame for info in infos if info.traceback for frame in info.traceback.frames]
    line = user_line(Frame(frame.file_name, frame.line_num, frame.function_name) for frame in frames)
    names = "/".join(str(info.name_stack) for info in reversed(infos) if str(info.name_stack))
    return f"{line}, in {names}" if names else line


def _stack(frame: FrameType | None) -> Iterator[Frame]:
    while frame is not None:
        yield Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def _traceback(traceback: TracebackType | None) -> Iterator[Frame]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        yield Frame(code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
