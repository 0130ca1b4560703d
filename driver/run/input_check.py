"""Whether all ranks give a step the same batch and state, before anything of them is sent.

Each rank uses the parts that its stages read. Where ranks draw different batches, one takes its own inputs and another
its own labels, and nothing fails: the step just learns nothing.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bactrian.driver.arrays.leaf_types import is_key
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import Control
from bactrian.runtime.lockstep import exchange

Digest = np.ndarray[Any, Any]  # for each chunk of an array: what stands for its values, and how large these are
_NUM_CHUNKS = 8
_MOST_OF_A_CHUNK = 1 << 16  # elements that are looked at
_TOLERANCE = 1e-5  # of the sum of absolute values: libraries round differently on other numbers of cores


def refuse_different_inputs(control: Control, values: Mapping[str, Any], name: str) -> None:
    """Refuse arguments that are not the same on all ranks (collective).

    Args:
        control: of all ranks.
        values: arguments by path, the same paths on every rank.
        name: of the step.

    Raises:
        ConfigError: names the first argument that differs, and the ranks.
    """
    everyone = exchange(control, [digest(value) for value in values.values()])
    for rank, digests in enumerate(everyone):
        differ = [path for path, own, first in zip(values, digests, everyone[0], strict=True) if not _alike(own, first)]
        if differ:
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            raise ConfigError(
                f"ranks give {name} different values of {differ[0]}{more}: rank {rank}'s are not rank 0's",
                where=line_here(),
                why="all ranks work on one batch and one state, each on its part of the step",
                fix="seed alike on every rank, as in np.random.default_rng(0), and draw as often on each; where a loader "
                "gives each rank its own part on purpose, parallelize(..., check_inputs=False)",
            )


def digest(value: Any) -> Digest:
    """What stands for the values of an array: two numbers for each of eight chunks, 128 bytes.

    Of floats a sum with a different weight for each place, and the sum of absolute values; of all else a checksum, and
    0. Of a large array, 65,536 elements of each chunk are looked at.
    """
    host = _host(value)
    flat = host.reshape(-1)
    if flat.dtype.kind == "c":
        flat = flat.view(flat.real.dtype)
    chunks = [chunk[:_MOST_OF_A_CHUNK] for chunk in np.array_split(flat, _NUM_CHUNKS)]
    return np.array([_of_floats(chunk) if _is_float(chunk.dtype) else _of_bits(chunk) for chunk in chunks])


def _of_floats(chunk: np.ndarray[Any, Any]) -> tuple[float, float]:
    numbers = chunk.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        # Not `@`: BLAS would start threads, which other ranks' cores pay for.
        return float((numbers * _weights()[: chunk.size]).sum()), float(np.abs(numbers).sum())


def _of_bits(chunk: np.ndarray[Any, Any]) -> tuple[float, float]:
    return float(zlib.crc32(chunk.tobytes())), 0.0


@functools.cache
def _weights() -> np.ndarray[Any, Any]:
    return np.cos(np.arange(_MOST_OF_A_CHUNK, dtype=np.float64))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _host(value: Any) -> np.ndarray[Any, Any]:
    if is_key(getattr(value, "dtype", None)):
        value = jax.random.key_data(value)
    return np.asarray(value)


def _alike(one: Digest, other: Digest) -> bool:
    within = np.abs(one[:, 0] - other[:, 0]) <= _TOLERANCE * np.maximum(one[:, 1], other[:, 1])
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return bool(np.all(within | same[:, 0]))
