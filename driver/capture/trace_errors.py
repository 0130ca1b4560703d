"""What JAX raises while a step is traced, in our words and with the user's line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bactrian.driver.capture.argument_shardings import MAKE_AUTO
from bactrian.driver.capture.gradient_boundary import GRADIENT_BOUNDARY
from bactrian.driver.source import line_here, line_of_error
from bactrian.passes.frame.errors import ProgramError

_NOT_TRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, jax.errors.UnexpectedTracerError)
_UNBOUND_AXIS = re.compile(r"unbound axis name: ([\w-]+)")

_ARGUMENT = re.compile(r"\bleaves\[(\d+)\]")  # JAX's name for an argument of the function on leaves that is traced
_NO_SHAPE = "Shapes must be 1D sequences of concrete values"


def explain_trace_error(
    error: Exception, name: str, num_microbatches: int, numbers: Mapping[int, tuple[str, type[Any]]]
) -> ProgramError | None:
    """The error to raise in the place of another; None where that says enough.

    Args:
        error: what was raised.
        name: of the step.
        num_microbatches: that the batch is cut into.
        numbers: the arguments that are Python numbers, with path and type, by number.
    """
    text = str(error)
    if isinstance(error, _NOT_TRACEABLE) or (isinstance(error, TypeError) and _NO_SHAPE in text):
        blamed = [numbers[i] for i in map(int, _ARGUMENT.findall(text)) if i in numbers]
        if blamed:
            return _should_be_static(error, name, blamed)
        return ProgramError(
            f"{name} can't be traced with abstract values: {text.splitlines()[0]}",
            where=line_of_error(error),
            why=type(error).__name__ + ": shapes and Python control flow may not depend on array values",
            fix="use jnp.where, lax.cond or a mask of fixed size; settings are given as static_argnames=... of parallelize",
        )
    if "with_sharding_constraint" in text and ("Auto axes" in text or "`Explicit`" in text):
        return ProgramError(
            f"a sharding constraint is over a mesh with axes of type Explicit: {text.splitlines()[0]}",
            where=line_of_error(error),
            why="values have the shardings of such a mesh in their types, and a constraint can't change them",
            fix=MAKE_AUTO,
        )
    if (unbound := _unbound(error, name)) is not None:
        return unbound
    if not isinstance(error, ValueError):
        return None
    if "Sharding" in text and "partition" in text:
        return ProgramError(
            f"a sharding does not split a value into equal shards: {text.splitlines()[0]}",
            where=line_of_error(error) or line_here(),
            why=f"the step is traced with 1 of {num_microbatches} microbatches of the batch"
            if num_microbatches > 1
            else "",
            fix="make the dim a multiple of the sizes of the axes that shard it, or shard another one",
        )
    if GRADIENT_BOUNDARY in text:
        return ProgramError(
            "the gradient boundary is differentiated",
            where=line_of_error(error),
            why="bactrian.value_and_grad stands inside of a function whose gradient is taken",
            fix="use jax.grad for the inner gradient, and bactrian.grad for the outermost one only",
        )
    return None


def _should_be_static(error: Exception, name: str, blamed: Sequence[tuple[str, type[Any]]]) -> ProgramError:
    """The error about Python numbers that are arguments, and whose values Python asks for."""
    what = " and ".join(f"{path}, a Python {kind.__name__}," for path, kind in dict(blamed).items())
    names = list(dict.fromkeys(re.split(r"\W", path, maxsplit=1)[0] for path, _ in blamed))
    given = repr(names[0]) if len(names) == 1 else f"({', '.join(map(repr, names))})"
    return ProgramError(
        f"{name} can't be traced with an abstract value of {what.removesuffix(',')}",
        where=line_of_error(error),
        why="numbers are arrays inside of a step, and shapes and Python control flow may not depend on array values",
        fix=f"parallelize(..., static_argnames={given}) gives the step its value; or use jnp.where or lax.cond",
    )


def _unbound(error: Exception, name: str) -> ProgramError | None:
    """The error where a step uses an axis or an object of ``nnx`` that does not belong to the function that is traced."""
    text = str(error)
    if type(error).__name__ == "TraceContextError":  # of flax
        return ProgramError(
            f"{name} updates an nnx variable inside of a gradient that did not get it: {text.splitlines()[0]}",
            where=line_of_error(error),
            why="in the function of a gradient only its arguments can be updated",
            fix="give the model to bactrian.value_and_grad's function as the argument that it differentiates; or make one in "
            "there, nnx.merge(graphdef, params, rest, copy=True), and return its new statistics as aux",
        )
    if isinstance(error, NameError) and (axis := _UNBOUND_AXIS.search(text)):
        return ProgramError(
            f"{name} uses the axis {axis[1]!r}, which nothing binds",
            where=line_of_error(error),
            why="jax.pmap binds an axis of devices; a parallelized step is one program on the whole batch",
            fix=f"say parallelize(axis_name={axis[1]!r}): it has one device then, on which a mean over devices is the "
            "value itself; or take pmean and its kin out",
        )
    return None
