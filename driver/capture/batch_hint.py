"""A hint for errors of steps whose batch is not the argument that it is by default."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bactrian.driver.arrays.leaf_types import is_array
from bactrian.driver.capture.state_matching import StepPart
from bactrian.driver.source import line_here, line_of_error
from bactrian.passes.frame.errors import ProgramError

DEFAULT_BATCH = 1
"""The positional argument that is the batch if nothing says otherwise."""


@dataclass(frozen=True)
class BatchHint:
    """Which arguments could be the batch, where the one that is it by default looks like something else.

    Args:
        why: what the default argument is taken for.
        fix: what to write.
    """

    why: str
    fix: str

    @classmethod
    def of(cls, args: Sequence[Any], names: Sequence[str]) -> BatchHint | None:
        """The hint for a call; None if the default argument has the looks of a batch.

        All leaves of a batch mostly have as many rows; those of parameters do not, or there is only one.
        """
        if len(args) <= DEFAULT_BATCH:
            return None
        rows = [_rows(arg) for arg in args]
        looks = [len(set(each)) == 1 and each[0] > 0 for each in rows]
        if looks[DEFAULT_BATCH] and len(rows[DEFAULT_BATCH]) > 1:
            return None
        least = 2 if looks[DEFAULT_BATCH] else 1
        others = [i for i in range(len(args)) if i > DEFAULT_BATCH or not looks[DEFAULT_BATCH]]
        likely = [i for i in others if looks[i] and len(rows[i]) >= least]
        if looks[DEFAULT_BATCH] and not likely:
            return None
        why = f"argument {DEFAULT_BATCH} ({names[DEFAULT_BATCH]}) is taken for the batch, since batch_argnums is not given"
        if not likely:
            return cls(why, "say with batch_argnums which argument is the batch; () for none")
        best = likely[-1]
        return cls(why, f"say batch_argnums=({best},) if the batch is {names[best]}")

    def refuse_returned(
        self, arguments: Sequence[StepPart], elements: Sequence[StepPart], dependencies: Sequence[int]
    ) -> None:
        """Raises a ProgramError if the step returns what looks like the next value of the default argument."""
        argument = arguments[DEFAULT_BATCH]
        for element in elements:
            if element.signature == argument.signature and element.reads(argument, dependencies):
                raise ProgramError(
                    f"{element.name} looks like the next value of {argument.name}, which can't be state",
                    where=line_here(),
                    why=self.why,
                    fix=self.fix,
                )

    @contextmanager
    def added(self, name: str) -> Generator[None]:
        """Adds the hint to what is raised while the step ``name`` is traced.

        Raises:
            ProgramError: in the place of another one, or of an error from the inside of a model.
        """
        try:
            yield
        except ProgramError as error:
            why = "; ".join(filter(None, (error.why, self.why)))
            fix = "; ".join(filter(None, (self.fix, error.fix and f"otherwise, {error.fix}")))
            raise ProgramError(error.message, where=error.where, why=why, fix=fix, place=error.place) from error
        except (TypeError, ValueError) as error:
            message = f"{name} can't be traced: {str(error).splitlines()[0]}"
            raise ProgramError(message, where=line_of_error(error), why=self.why, fix=self.fix) from error


def _rows(arg: Any) -> list[int]:
    """Dim 0 of each array leaf of an argument; -1 of a scalar, and of a random key."""
    leaves = [leaf for leaf in jax.tree.leaves(arg) if is_array(leaf)]
    shapes = [getattr(leaf, "shape", ()) for leaf in leaves]
    return [-1 if not shape or _is_key(leaf) else int(shape[0]) for leaf, shape in zip(leaves, shapes, strict=True)]


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a random key, typed or not."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
