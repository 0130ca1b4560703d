"""Which leaves of a pytree are data, and what typed keys are carried as."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a pytree leaf is data (an array, an abstract one or a Python number); everything else is static."""
    if isinstance(leaf, (bool, int, float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape") or isinstance(leaf, type):
        return False
    return dtype != jax.dtypes.float0 and not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


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
