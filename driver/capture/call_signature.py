"""The arguments of a call of a step: flattened, and told apart by shapes, dtypes and static leaves."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.leaf_types import array_positions, is_key
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.runtime.lockstep import CollectiveCall


@dataclass(frozen=True)
class StaticArgument:
    """A static argument as a leaf, told apart by value and type (``1`` is not ``True``)."""

    value: Any
    kind: type[Any]


@dataclass(frozen=True)
class Parameters:
    """The parameters of a step.

    Attributes:
        signature: of the function, where it has one.
        static_argnums, static_argnames: of static arguments, by position and by name.
    """

    signature: inspect.Signature | None
    static_argnums: frozenset[int] = frozenset()
    static_argnames: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, fun: Callable[..., Any], static_argnums: Sequence[int] = (), static_argnames: Sequence[str] = ()
    ) -> Parameters:
        """The parameters of ``fun``; what is given by position is static by name too, and the other way round.

        Raises:
            ConfigError: ``fun`` has no such parameter.
        """
        try:
            signature = inspect.signature(fun)
        except (TypeError, ValueError):
            return cls(None, frozenset(static_argnums), frozenset(static_argnames))
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        positional = [name for name, kind in kinds.items() if kind in _POSITIONAL]
        for argnum in static_argnums:
            if (
                not -len(positional) <= argnum < len(positional)
                and inspect.Parameter.VAR_POSITIONAL not in kinds.values()
            ):
                _refuse_static("static_argnums", argnum, f"{len(positional)} positional parameters")
        for name in static_argnames:
            if name not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds.values():
                _refuse_static("static_argnames", name, f"the parameters {', '.join(kinds)}")
        numbers = {argnum + len(positional) if argnum < 0 else argnum for argnum in static_argnums}
        names = {positional[argnum] for argnum in numbers if argnum < len(positional)}.union(static_argnames)
        numbers.update(argnum for argnum, name in enumerate(positional) if name in names)
        return cls(signature, frozenset(numbers), frozenset(names))

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments, positional ones by position, static ones as `StaticArgument`."""
        args, kwargs = tuple(args), dict(kwargs)
        if kwargs and self.signature is not None:
            call = self.signature.bind(*args, **kwargs)
            args, kwargs = call.args, call.kwargs
        if self.static_argnums:
            args = tuple(_static(arg) if argnum in self.static_argnums else arg for argnum, arg in enumerate(args))
        if self.static_argnames:
            kwargs = {name: _static(arg) if name in self.static_argnames else arg for name, arg in kwargs.items()}
        return args, kwargs


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _static(value: Any) -> StaticArgument:
    return StaticArgument(value, type(value))


def _refuse_static(option: str, given: int | str, has: str) -> NoReturn:
    raise ConfigError(f"{option} has {given!r}, but the step has {has}", where=line_here(), fix="name one of these")


@dataclass(frozen=True, eq=False)
class FlatCall:
    """The arguments of one call, flattened: ``leaves`` are data, ``statics`` (position, value) everything else."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tree: Any
    leaves: list[Any]
    statics: tuple[tuple[int, Any], ...]

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """Equal for calls that the same captured program serves; hashable."""
        return self.tree, tuple(map(aval_key, self.leaves)), self.statics

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's ``args`` and ``kwargs`` with other data."""
        statics = [(i, value.value if isinstance(value, StaticArgument) else value) for i, value in self.statics]
        return jax.tree.unflatten(self.tree, merged(list(leaves), statics))


def flatten_call(parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatCall:
    """Flattens a call; an argument given by keyword that could be positional is positional.

    Raises:
        ProgramError: a static leaf can't be hashed.
    """
    args, kwargs = parameters.bound(args, kwargs)
    flat, tree = jax.tree.flatten((args, kwargs))
    data = array_positions(flat, tree)
    if len(data) == len(flat):
        return FlatCall(args, kwargs, tree, flat, ())
    static = set(range(len(flat))).difference(data)
    statics = tuple((i, flat[i]) for i in sorted(static))
    for i, leaf in statics:
        try:
            hash(leaf)
        except TypeError:
            path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path((args, kwargs))[i][0])
            _refuse_unhashable(path, leaf)
    return FlatCall(args, kwargs, tree, [flat[i] for i in data], statics)


def _refuse_unhashable(path: str, leaf: Any) -> NoReturn:
    if isinstance(leaf, StaticArgument):
        raise ProgramError(
            f"the static argument {path} can't be hashed: {leaf.kind.__qualname__}",
            where=line_here(),
            why="a step is traced anew for each value of a static argument, and remembers it by hash and equality",
            fix="use a frozen dataclass or a tuple; arrays are no static arguments",
        )
    raise ProgramError(
        f"the argument leaf {path} is neither an array nor hashable: {type(leaf).__qualname__}",
        where=line_here(),
        fix="convert it to an array, or keep it out of the arguments",
    )


class NamedLeaf(NamedTuple):
    """A data leaf of a call, the user's path of it, and its argument's position; None for one given by keyword."""

    path: str
    argnum: int | None
    leaf: Any

    @property
    def aval(self) -> str:
        """Dtype and shape in words, ``float32[8,6]``."""
        return aval_text(*aval_key(self.leaf)[:2])


def named_leaves(call: FlatCall, parameters: Parameters) -> list[NamedLeaf]:
    """The data leaves of a call, in order."""
    names = argument_names(len(call.args), parameters)
    static = {i for i, _ in call.statics}
    found = list[NamedLeaf]()
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path((call.args, call.kwargs))):
        if i not in static:
            argnum = path[1].idx if path[0].idx == 0 else None
            name = names[argnum] if argnum is not None else path[1].key
            found.append(NamedLeaf(name + jax.tree_util.keystr(path[2:]), argnum, leaf))
    return found


def argument_names(count: int, parameters: Parameters) -> list[str]:
    """The names of so many positional arguments."""
    names: list[str] = []
    signature = parameters.signature
    for parameter in signature.parameters.values() if signature else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return (names + [f"args[{i}]" for i in range(len(names), count)])[:count]


def aval_text(shape: Sequence[int], dtype: Any) -> str:
    """Dtype and shape in words, ``float32[8,6]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def collective_call(kind: str, name: str, signature: tuple[Any, ...], batch: Sequence[str]) -> CollectiveCall:
    """The call of a step, as ranks compare it.

    Args:
        kind: of the call.
        name: of the step.
        signature: of the call.
        batch: paths, dtypes and shapes of its batch, in words.
    """
    more = f" and {len(batch) - 2} more" if len(batch) > 2 else ""
    return CollectiveCall(kind, name, ", ".join(batch[:2]) + more, zlib.crc32(repr(signature[1]).encode()))


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype (as JAX has it: 32 bits unless x64 is on) and weak type of a data leaf."""
    shape, dtype, weak_type = aval_key(leaf)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type)


def aval_key(leaf: Any) -> tuple[tuple[int, ...], Any, bool]:
    """``abstract`` as a tuple; runs for every leaf of every call."""
    if isinstance(leaf, DistributedArray):
        return leaf.placement.aval_key
    if isinstance(leaf, (bool, int, float, complex)):
        return (), jnp.asarray(leaf).dtype, not isinstance(leaf, bool)
    weak_type = bool(getattr(leaf, "weak_type", False))
    return tuple(leaf.shape), _canonical_dtype(leaf.dtype, jax.config.read("jax_enable_x64")), weak_type


@functools.lru_cache(maxsize=256)
def _canonical_dtype(dtype: Any, _x64: bool) -> Any:
    return dtype if is_key(dtype) else jax.dtypes.canonicalize_dtype(dtype)


def merged(leaves: list[Any], statics: Sequence[tuple[int, Any]]) -> list[Any]:
    """``leaves`` with the static ones put back at their positions."""
    for position, value in statics:  # positions ascend
        leaves.insert(position, value)
    return leaves
