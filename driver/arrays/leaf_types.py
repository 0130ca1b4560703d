"""Which leaves of a pytree are data, and what typed keys are carried as."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (bool, int, float, complex)


def is_array(leaf: Any) -> bool:
    """Whether a pytree leaf is data (an array, an abstract one or a Python number); everything else is static."""
    if isinstance(leaf, _NUMBERS):
        return True
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape") or isinstance(leaf, type):
        return False
    return dtype != jax.dtypes.float0 and not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


def array_positions(leaves: Sequence[Any], tree: Any) -> list[int]:
    """Which of a tree's leaves are data: those that `is_array` takes for such, but not a Python number in a module of
    Equinox, where it is a setting (the rate of a dropout), as under ``eqx.filter_jit``."""
    data = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    equinox = sys.modules.get("equinox")  # whoever has such a module has imported it
    if equinox is None or not any(isinstance(leaf, _NUMBERS) for leaf in leaves):
        return data
    inside = _positions_inside(tree, equinox.Module)
    return [i for i in data if i not in inside or not isinstance(leaves[i], _NUMBERS)]


@functools.lru_cache(maxsize=256)
def _positions_inside(tree: Any, kind: type[Any]) -> frozenset[int]:
    """The leaves below nodes of some type."""
    positions = jax.tree.unflatten(tree, range(tree.num_leaves))
    nodes = jax.tree.leaves(positions, is_leaf=lambda node: isinstance(node, kind))
    return frozenset(position for node in nodes if isinstance(node, kind) for position in jax.tree.leaves(node))


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys."""
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def physical(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what stages carry: a typed key is its uint32 words."""
    logical = jax.ShapeDtypeStruct(shape, dtype)
    if not is_key(dtype):
        return logical
    physical = jax.eval_shape(jax.random.key_data, logical)
    return jax.ShapeDtypeStruct(physical.shape, physical.dtype)
