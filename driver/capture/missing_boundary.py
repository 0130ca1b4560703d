"""The error of a step without a gradient boundary: which call takes its gradient, and what to write there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from bactrian.driver.source import Frame, line_here, user_line
from bactrian.passes.frame.errors import ProgramError

_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_OURS = {"grad": "bactrian.grad", "value_and_grad": "bactrian.value_and_grad"}
_LIBRARIES = {  # folder -> the names of its own functions
    "equinox": {"grad": "eqx.filter_grad", "value_and_grad": "eqx.filter_value_and_grad"},
    f"flax{os.sep}nnx": {"grad": "nnx.grad", "value_and_grad": "nnx.value_and_grad"},
    "haiku": {"grad": "hk.grad", "value_and_grad": "hk.value_and_grad"},
}


def missing_boundary(equations: Iterable[tuple[Any, Sequence[Any]]]) -> ProgramError:
    """The error to raise.

    Args:
        equations: of the step, in order, each with the calls that it stands in, innermost first.
    """
    for equation, callers in equations:
        found = _gradient_call(equation, callers)
        if found is not None:
            name, kind, line = found
            return ProgramError(
                f"the step has no gradient boundary: {name} takes its gradient",
                where=line,
                why=f"{_OURS[kind]} says which part of a step runs once per microbatch, {name} does not",
                fix=f"write {_OURS[kind]} in the place of {name}; it takes the same arguments",
            )
    return ProgramError(
        "the step has no gradient boundary",
        where=line_here(),
        why="bactrian.value_and_grad or bactrian.grad says which part of a step runs once per microbatch",
        fix="use bactrian.value_and_grad in place of jax.value_and_grad, or forward_only=True to run a function"
        " without gradients",
    )


def _gradient_call(equation: Any, callers: Sequence[Any]) -> tuple[str, str, str] | None:
    """The outermost gradient that an equation was traced in: the function's name, which of `_OURS` it is, and the line of
    the call."""
    infos = [each.source_info for each in (equation, *callers)]
    frames = [
        Frame(frame.file_name, frame.line_num, frame.function_name)
        for info in infos
        if info.traceback
        for frame in info.traceback.frames
    ]
    places = [i for i, frame in enumerate(frames) if frame.file.startswith(_JAX) and _kind(frame.function)]
    if not places:
        return None
    last = places[-1]
    kind, outer = _kind(frames[last].function), frames[last + 1 :]
    line = user_line(outer)
    between = list(itertools.takewhile(lambda frame: str(frame) != line, outer))
    for folder, names in _LIBRARIES.items():
        own = [frame for frame in between if f"{os.sep}{folder}{os.sep}" in frame.file]
        if own:
            if (
                sum(frame.function.endswith("__call__") for frame in own) > 1
            ):  # Equinox: its grad calls its value_and_grad
                kind = "grad"
            return names[kind], kind, line
    return f"jax.{kind}", kind, line


def _kind(function: str) -> str:
    """Which of JAX's functions a frame belongs to, "" if to neither."""
    name = function.rpartition(".")[2].removesuffix("_aux")
    return {"grad_f": "grad", "value_and_grad_f": "value_and_grad"}.get(name, "")
