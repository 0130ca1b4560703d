"""Arrays that live on the stages of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import BactrianError, ProgramError
from bactrian.runtime.control import Control, SingleProcess


class DistributedArray:
    """An array on one or several stages. A pytree leaf that can be passed to steps, gathered and saved, nothing else.

    ``pieces`` holds this rank's copies by stage (a ``jax.Array`` each; empty on ranks that hold none). Steps call
    ``donate`` on what they consume.
    """

    __slots__ = ("control", "donated_by", "pieces", "placement")
    __array_priority__ = 1000  # numpy asks us first, and is refused

    def __init__(
        self, placement: ArgumentPlacement, pieces: Mapping[int, jax.Array], control: Control | None = None
    ) -> None:
        self.placement = placement
        self.pieces: dict[int, jax.Array] = dict(pieces)
        self.control: Control = control or SingleProcess()
        self.donated_by: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape."""
        return self.placement.shape

    @property
    def dtype(self) -> Any:
        """The dtype; a typed key's is its key dtype."""
        return self.placement.dtype

    @property
    def weak_type(self) -> bool:
        """Whether the dtype gives way in promotions, as a Python number's does."""
        return self.placement.weak_type

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def path(self) -> str:
        """The user's pytree path."""
        return self.placement.path

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that hold it."""
        return self.placement.stages

    @property
    def sharding(self) -> str:
        """Mesh and sharding in words."""
        return self.placement.sharding_text

    def piece(self, stage: int) -> jax.Array:
        """This rank's copy on ``stage``.

        Raises:
            ProgramError: the array was donated.
        """
        self.check_usable()
        return self.pieces[stage]

    def donate(self, where: str = "") -> dict[int, jax.Array]:
        """Hands the pieces over to a step; later use is refused and names ``where`` (by default, the user's line)."""
        self.check_usable()
        pieces, self.pieces = self.pieces, {}
        self.donated_by = where or line_here() or "an earlier call"
        return pieces

    def check_usable(self) -> None:
        """Raises a ProgramError if the array was donated or deleted."""
        where = self.donated_by
        if where is None:
            for piece in self.pieces.values():
                if piece.is_deleted():
                    where = "an earlier call"
        if where is not None:
            raise ProgramError(
                f"a donated value was used a second time: {self.path}",
                where=line_here(),
                why=f"it was donated at {where}",
                fix="use the state that the step returned, or parallelize(..., donate=False)",
            )

    def __repr__(self) -> str:
        kind = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        stages = ", ".join(map(str, self.stages))
        parts = [self.path, kind, f"stage{'s' * (len(self.stages) != 1)} {stages}", self.sharding]
        if self.donated_by is not None:
            parts.append("donated")
        return f"DistributedArray({', '.join(part for part in parts if part)})"


def of_pieces(placement: ArgumentPlacement, pieces: dict[int, jax.Array], control: Control) -> DistributedArray:
    """A distributed array without a copy of ``pieces``: a step makes one for every leaf of its state."""
    array = DistributedArray.__new__(DistributedArray)
    array.placement, array.pieces, array.control, array.donated_by = placement, pieces, control, None
    return array


def _refusal(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: DistributedArray, *_: Any, **__: Any) -> NoReturn:
        raise BactrianError(
            f"{operation} on {self!r}",
            where=line_here(),
            why="its values are on the devices of its stages, maybe of other ranks",
            fix="call bactrian.gather(tree) on all ranks: it returns numpy arrays",
        )

    return refuse


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "divmod")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_REFUSED = {
    "arithmetic": [f"__{side}{name}__" for name in _ARITHMETIC + _BITWISE for side in ("", "r")]
    + ["__neg__", "__pos__", "__abs__", "__invert__"],
    "comparison": [f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne")],
    "indexing": ["__getitem__", "__setitem__"],
    "iteration": ["__iter__", "__len__", "__contains__"],
    "conversion": ["__array__", "__jax_array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"]
    + ["__array_ufunc__", "__array_function__", "__round__"],
}
for _operation, _names in _REFUSED.items():
    for _name in _names:
        setattr(DistributedArray, _name, _refusal(_operation))
setattr(DistributedArray, "__hash__", object.__hash__)  # noqa: B010 -- __eq__ was refused, identity is the hash
