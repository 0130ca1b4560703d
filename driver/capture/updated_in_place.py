"""Arguments that a step updates in place: variables of flax's ``nnx``, as under ``nnx.jit``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax

from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ProgramError


def variables(tree: Any) -> list[Any]:
    """The ``nnx`` variables in a pytree, in order."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(leaf)]


class Snapshot:
    """What the arguments of a function are before it runs: their trees, and the array leaves of those with variables."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.args = args
        self._before = {i: jax.tree.flatten(arg) for i, arg in enumerate(args) if variables(arg)}

    def updated(self, result: Any) -> tuple[int, ...]:
        """The arguments whose variables have other values now, and are not returned as part of ``result``.

        Raises:
            ProgramError: an argument has another structure now.
        """
        returned = {id(leaf) for leaf in jax.tree.leaves(result)}
        found = list[int]()
        for i, (old, tree) in self._before.items():
            new, now = jax.tree.flatten(self.args[i])
            if now != tree:
                raise ProgramError(
                    f"the step changes the structure of argument {i} in place",
                    where=line_here(),
                    why="the values of its variables can be updated in place; what else changes is lost",
                    fix="make all variables before the first step, or return the new object",
                )
            changed = [leaf for before, leaf in zip(old, new, strict=True) if leaf is not before]
            if any(id(leaf) not in returned for leaf in changed):
                found.append(i)
        return tuple(found)


def write_back(argument: Any, new: Any) -> None:
    """Give the variables in ``argument`` the values of those in ``new``, which has the same structure."""
    for variable, other in zip(variables(argument), variables(new), strict=True):
        variable.update_from_state(other)
