"""Arrays over receive buffers are used again, but never while somebody may read them."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from bactrian.runtime.transports.interface import device_array
from bactrian.runtime.transports.mpi import ArrayPool

SHAPE, DTYPE = (4, 32), np.dtype(np.float32)


def place() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices("cpu")[0])


def test_what_is_written_to_the_memory_is_in_the_array() -> None:
    taken = ArrayPool(device_array).take(SHAPE, DTYPE, place())
    assert taken is not None
    array, buffer = taken
    buffer.view(DTYPE)[:] = np.arange(128)
    assert np.array_equal(jax.jit(lambda x: x + 1)(array), np.arange(1, 129).reshape(SHAPE))


def test_an_array_in_use_is_not_given_again() -> None:
    pool = ArrayPool(device_array)
    first = pool.take(SHAPE, DTYPE, place())
    second = pool.take(SHAPE, DTYPE, place())
    assert first is not None and second is not None
    assert first[0] is not second[0]
    pointers = {first[0].unsafe_buffer_pointer(), second[0].unsafe_buffer_pointer()}
    assert len(pointers) == 2
    kept = second[0]
    del first, second
    third = pool.take(SHAPE, DTYPE, place())
    fourth = pool.take(SHAPE, DTYPE, place())
    assert third is not None and fourth is not None
    assert third[0] is not kept and fourth[0] is not kept
    assert third[0].unsafe_buffer_pointer() in pointers
    assert fourth[0].unsafe_buffer_pointer() not in pointers


def test_shapes_have_arrays_of_their_own() -> None:
    pool = ArrayPool(device_array)
    taken = pool.take(SHAPE, DTYPE, place())
    assert taken is not None
    pointer = taken[0].unsafe_buffer_pointer()
    del taken
    other = pool.take(SHAPE[::-1], DTYPE, place())
    assert other is not None
    assert other[0].shape == SHAPE[::-1] and other[0].unsafe_buffer_pointer() != pointer


def test_no_array_where_the_device_copies() -> None:
    def copies(view: np.ndarray, sharding: Sharding, _: bool) -> jax.Array:
        return device_array(view, sharding, True)

    assert ArrayPool(copies).take(SHAPE, DTYPE, place()) is None
