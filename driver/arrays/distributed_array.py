"""Arrays that live on the stages of a step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.hijax import ShapedArray, register_hitype

from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import BactrianError, ProgramError
from bactrian.runtime.control import Control, SingleProcess


class DistributedArray(jax.Array):
    """An array on one or several stages: a pytree leaf that can be passed to steps, gathered and saved.

    It describes itself as other ``jax.Array``s do. Where this process has all of its values (``is_fully_addressable``) it
    converts to numpy and can be indexed, and a scalar is a number in arithmetic, comparisons and texts. JAX's functions and everything else
    refuse it, with an error that names ``bactrian.gather``. Nothing but ``gather`` waits for other ranks.

    ``pieces`` holds this rank's copies by stage (a ``jax.Array`` each; empty on ranks that hold none). Steps call
    ``donate`` on what they consume.
    """

    __slots__ = ("control", "donated_by", "pieces", "placement")
    __array_priority__ = 1000  # numpy asks us first

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
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, once."""
        return self.size * self.itemsize

    @property
    def path(self) -> str:
        """The user's pytree path."""
        return self.placement.path

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that hold it."""
        return self.placement.stages

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of this rank's copy: of the first, if several of its stages have one.

        Raises:
            AttributeError: this rank has none, or its stages have different rows.
        """
        if self.placement.rows:
            raise _no_attribute(self, "sharding", "its stages hold different rows of it")
        for sharding in self.placement.shardings.values():
            return sharding
        raise _no_attribute(self, "sharding", "this rank holds no part of it")

    @property
    def is_fully_addressable(self) -> bool:
        """Whether this process has all values, so that they can be converted without other ranks."""
        return bool(self.placement.stages_here)

    @property
    def is_fully_replicated(self) -> bool:
        """Whether each device of its stages has all values."""
        return self.placement.is_replicated

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

    def is_deleted(self) -> bool:
        """Whether the array was donated or deleted."""
        return self.donated_by is not None or any(piece.is_deleted() for piece in self.pieces.values())

    def check_usable(self) -> None:
        """Raises a ProgramError if the array was donated or deleted."""
        if self.is_deleted():
            raise ProgramError(
                f"a donated value was used a second time: {self.path}",
                where=line_here(),
                why=f"it was donated at {self.donated_by or 'an earlier call'}",
                fix="use the state that the step returned, or parallelize(..., donate=False)",
            )

    def block_until_ready(self) -> DistributedArray:
        """Wait until this rank's copies are computed."""
        self.check_usable()
        for piece in self.pieces.values():
            piece.block_until_ready()
        return self

    def copy(self) -> DistributedArray:
        """The same values at the same places, in memory of their own; each rank copies what it has."""
        self.check_usable()
        return of_pieces(self.placement, {stage: jnp.copy(piece) for stage, piece in self.pieces.items()}, self.control)

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> DistributedArray:
        return self.copy()

    def __array__(self, dtype: Any = None, context: None = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(_values(self, "conversion to numpy"), dtype=dtype, copy=copy)

    def __reduce__(self) -> Any:
        """Pickled as a numpy array; ``bactrian.put`` is the way back."""
        return _values(self, "pickle").__reduce__()

    def copy_to_host_async(self) -> None:
        """Check what ``jax.device_get`` asks for before it is begun."""
        _values(self, "jax.device_get")

    def item(self, *args: int) -> Any:
        """A scalar as a Python number."""
        return _number(self, "conversion").item(*args)

    def tolist(self) -> Any:
        """Python numbers, in nested lists."""
        return _values(self, "conversion").tolist()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a scalar")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return _values(self, "indexing")[index]

    def __iter__(self) -> Any:
        return iter(_values(self, "iteration"))

    def __repr__(self) -> str:
        kind = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        stages = ", ".join(map(str, self.stages))
        parts = [self.path, kind, f"stage{'s' * (len(self.stages) != 1)} {stages}", self.placement.sharding_text]
        if self.donated_by is not None:
            parts.append("donated")
        return f"DistributedArray({', '.join(part for part in parts if part)})"

    def __str__(self) -> str:
        if self.shape or self.is_deleted() or not _can_convert(self):
            return repr(self)
        return str(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    @property
    def __jax_array__(self) -> NoReturn:
        """JAX asks for it where it makes an array of an argument."""
        raise _refusal(self, "a function of JAX")

    @property
    def format(self) -> NoReturn:
        """JAX asks for it before it runs a function on arguments."""
        raise _refusal(self, "a function of JAX")


def of_pieces(placement: ArgumentPlacement, pieces: dict[int, jax.Array], control: Control) -> DistributedArray:
    """A distributed array without a copy of ``pieces``: a step makes one for every leaf of its state."""
    array = DistributedArray.__new__(DistributedArray)
    array.placement, array.pieces, array.control, array.donated_by = placement, pieces, control, None
    return array


# `jax.typeof` knows it; libraries ask that of every array.
register_hitype(DistributedArray, lambda x: ShapedArray(x.shape, x.dtype, weak_type=x.weak_type))


class ArrayAttributeError(BactrianError, AttributeError):
    """An attribute of ``jax.Array`` that a distributed array has not."""


_FIX = "call bactrian.gather(tree) on all ranks: it returns numpy arrays"


def _can_convert(array: DistributedArray) -> bool:
    return array.is_fully_addressable and array.placement.key_impl is None


def _values(array: DistributedArray, operation: str) -> np.ndarray[Any, Any]:
    """The whole array's values, if this process has them all."""
    array.check_usable()
    if not _can_convert(array):
        raise _refusal(array, operation)
    placement = array.placement
    return placement.whole((stage, np.asarray(array.pieces[stage])) for stage in placement.stages_here)


def _number(array: DistributedArray, operation: str) -> Any:
    """The value of a scalar, as numpy's."""
    if array.shape:
        raise _refusal(array, operation)
    return _values(array, operation)[()]


def _refusal(array: DistributedArray, operation: str) -> BactrianError:
    why = "its values are on the devices of its stages, maybe of other ranks"
    fix = _FIX if array.shape else f"take int() or float() of it, if its rank has it; or {_FIX}"
    return BactrianError(f"{operation} on {array!r}", where=line_here(), why=why, fix=fix)


def _no_attribute(array: DistributedArray, name: str, why: str) -> ArrayAttributeError:
    return ArrayAttributeError(f"{array!r} has no {name}", where=line_here(), why=why, fix=_FIX)


def _of_number(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: DistributedArray, *others: Any) -> Any:
        return function(_number(self, operation), *others)

    return apply


def _with_number(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: DistributedArray, other: Any) -> Any:
        return function(other, _number(self, operation))

    return apply


def _refused(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: DistributedArray, *_: Any) -> NoReturn:
        raise _refusal(self, operation)

    return refuse


def _without(name: str) -> property:
    def refuse(self: DistributedArray) -> NoReturn:
        raise _no_attribute(self, name, "its values are on the devices of its stages, maybe of other ranks")

    return property(refuse)


_PLAIN = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift")
_ARITHMETIC: dict[str, Callable[..., Any]] = {name: getattr(operator, name) for name in _PLAIN} | {
    "divmod": divmod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_OF_NUMBERS = {
    "arithmetic": _ARITHMETIC | {name: getattr(operator, name) for name in ("neg", "pos", "abs", "invert")},
    "comparison": {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "conversion": {
        "bool": bool,
        "int": int,
        "float": float,
        "complex": complex,
        "index": operator.index,
        "round": round,
    },
}
_REFUSED = {
    "arithmetic": ["matmul", "rmatmul"],
    "assignment": ["setitem"],
    "iteration": ["contains", "reversed"],
}
for _operation, _functions in _OF_NUMBERS.items():
    for _name, _function in _functions.items():
        setattr(DistributedArray, f"__{_name}__", _of_number(_operation, _function))
for _name, _function in _ARITHMETIC.items():
    setattr(DistributedArray, f"__r{_name}__", _with_number("arithmetic", _function))
for _operation, _names in _REFUSED.items():
    for _name in _names:
        setattr(DistributedArray, f"__{_name}__", _refused(_operation))
for _name in dir(jax.Array):
    if not _name.startswith("_") and _name not in vars(DistributedArray):
        setattr(DistributedArray, _name, _without(_name))
setattr(DistributedArray, "__hash__", None)  # noqa: B010 -- as of other arrays: equal ones would differ
