"""What JAX raises while a step is traced, in our words and with the user's line."""

from __future__ import annotations

import jax

from bactrian.driver.capture.gradient_boundary import GRADIENT_BOUNDARY
from bactrian.driver.source import line_here, line_of_error
from bactrian.passes.frame.errors import ProgramError

_NOT_TRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, jax.errors.UnexpectedTracerError)


def explain_trace_error(error: Exception, name: str, num_microbatches: int) -> ProgramError | None:
    """The error to raise in the place of another; None where that says enough.

    Args:
        error: what was raised.
        name: of the step.
        num_microbatches: that the batch is cut into.
    """
    text = str(error)
    if isinstance(error, _NOT_TRACEABLE):
        return ProgramError(
            f"{name} can't be traced with abstract values: {text.splitlines()[0]}",
            where=line_of_error(error),
            why=type(error).__name__ + ": shapes and Python control flow may not depend on array values",
            fix="use jnp.where, lax.cond or a mask of fixed size",
        )
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
