"""Host arrays on a device: the fast way does what `jax.device_put` does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from bactrian.driver.xla.compile_stage import device_array as fast
from bactrian.runtime.transports.interface import DeviceArray
from bactrian.runtime.transports.interface import device_array as plain

BOTH = pytest.mark.parametrize("device_array", [fast, plain])


def _place(number: int = 0) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[number])


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_, np.uint8, np.complex64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5, 7)])
def test_value_dtype_and_place(device_array: DeviceArray, dtype: type, shape: tuple[int, ...]) -> None:
    value = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    for copy in (False, True):
        array = device_array(value, _place(1), copy)
        assert array.sharding == _place(1) and array.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(array), value)
        assert jax.jit(jnp.ravel)(array).shape == (value.size,)


@BOTH
def test_a_copy_does_not_see_later_writes(device_array: DeviceArray) -> None:
    for size in (3, 1 << 16):
        value = np.zeros(size, np.float32)
        array = device_array(value, _place(), True)
        value[:] = 7
        assert not np.asarray(array).any()


@BOTH
def test_wide_values_become_what_jax_has(device_array: DeviceArray) -> None:
    assert device_array(np.ones(3, np.float64), _place(), True).dtype == jnp.float32
    assert device_array(np.ones(3, np.int64), _place(), False).dtype == jnp.int32


@BOTH
def test_a_view_that_is_not_contiguous(device_array: DeviceArray) -> None:
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(np.asarray(device_array(value[:, ::2], _place(), False)), value[:, ::2])
    np.testing.assert_array_equal(np.asarray(device_array(value.T, _place(), True)), value.T)
