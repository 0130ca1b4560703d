"""The array leaves of a captured step: the arguments and results of its ``@main``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from bactrian.driver.arrays.leaf_types import physical


@dataclass(frozen=True)
class ArgumentInfo:
    """One array argument of the captured ``@main``.

    ``shape`` is the user's: the full batch for batch leaves, without the key's words for a typed key. ``argnum`` is
    the positional argument of the step that it belongs to, ``None`` for keywords. ``updated_by`` is the number of the
    result that is its next value.
    """

    number: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: str  # "state", "batch", "constant"
    argnum: int | None
    key_impl: Any = None
    updated_by: int | None = None
    weak_type: bool = False

    @property
    def physical(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what stages carry: a typed key is its uint32 words."""
        return physical(self.shape, self.dtype)


@dataclass(frozen=True)
class ResultInfo:
    """One array result of the captured ``@main``; ``updates`` is the argument that it is the next value of."""

    number: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any = None
    updates: int | None = None
    weak_type: bool = False

    @property
    def physical(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what stages carry."""
        return physical(self.shape, self.dtype)
