"""The arguments of a call of a step: flattened, and told apart by shapes, dtypes and static leaves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.leaf_types import is_array, is_key
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ProgramError


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


def flatten_call(parameters: inspect.Signature | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatCall:
    """Flattens a call; an argument given by keyword that could be positional is positional.

    Raises:
        ProgramError: a static leaf can't be hashed.
    """
    args, kwargs = tuple(args), dict(kwargs)
    if kwargs and parameters is not None:
        bound = parameters.bind(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
    flat, tree = jax.tree.flatten((args, kwargs))
    statics = tuple(
        (i, leaf) for i, leaf in enumerate(flat) if not isinstance(leaf, DistributedArray) and not is_array(leaf)
    )
    for i, leaf in statics:
        try:
            hash(leaf)
        except TypeError:
            path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path((args, kwargs))[i][0])
            raise ProgramError(
                f"the argument leaf {path} is neither an array nor hashable: {type(leaf).__qualname__}",
                where=line_here(),
                fix="convert it to an array, or keep it out of the arguments",
            ) from None
    static = {i for i, _ in statics}
    leaves = [leaf for i, leaf in enumerate(flat) if i not in static] if static else flat
    return FlatCall(args, kwargs, tree, leaves, statics)


def parameters_of(fun: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of ``fun``, where it has one."""
    try:
        return inspect.signature(fun)
    except (TypeError, ValueError):
        return None


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
