"""Ranks whose batch or state differs are refused; equal ones and those that only rounded differently are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bactrian.driver.run.input_check import digest, refuse_different_inputs
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import SingleProcess

FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.complex64]
DTYPES = [*FLOATS, np.int32, np.uint8, np.bool_]


class Others(SingleProcess):
    """This rank among others, which make the same calls and have told their digests."""

    def __init__(self, *others: Any) -> None:
        self.others, self.size = others, 1 + len(others)

    def allgather(self, value: Any) -> list[Any]:
        report, own = value
        return [(replace(report, rank=rank), told) for rank, told in enumerate((own, *self.others))]


def compare(own: Any, other: Any) -> None:
    refuse_different_inputs(Others([digest(other)]), {"batch['x']": own}, "train")


def draw(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    numbers = np.random.default_rng(seed).normal(size=shape) * 4
    return np.asarray(numbers > 0 if dtype == np.bool_ else numbers).astype(dtype)


@pytest.mark.parametrize("shape", [(), (5,), (64, 3), (3, 200_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_pass_whatever_holds_them(dtype: Any, shape: tuple[int, ...]) -> None:
    values = draw(dtype, shape)
    compare(values, values.copy())
    compare(values, jnp.asarray(values) if dtype != np.float64 else np.asfortranarray(values))


@pytest.mark.parametrize("shape", [(5,), (64, 3), (3, 200_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_draws_are_refused(dtype: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"different values of batch\['x'\]: rank 1's are not rank 0's"):
        compare(draw(dtype, shape, 3), draw(dtype, shape, 4))


def test_other_orders_are_refused() -> None:
    values = draw(np.float32, (64, 3))
    with pytest.raises(ConfigError):
        compare(values, np.roll(values, 1, axis=0))


def test_one_other_row_is_refused() -> None:
    values = draw(np.float32, (512, 64))
    other = values.copy()
    other[300] = draw(np.float32, (64,), 7)
    with pytest.raises(ConfigError):
        compare(values, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_rounding_passes(dtype: Any) -> None:
    values = draw(dtype, (512, 64))
    compare(values, np.nextafter(values, dtype(100)))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_compared(special: float) -> None:
    mask = np.full((64, 64), special, np.float32)
    mask[:, 0] = 1
    compare(mask, mask.copy())
    with pytest.raises(ConfigError):
        compare(mask, np.where(np.isfinite(mask), mask, 0).astype(np.float32))


def test_typed_keys_are_compared() -> None:
    compare(jax.random.key(1), jax.random.key(1))
    with pytest.raises(ConfigError):
        compare(jax.random.key(1), jax.random.key(2))


def test_the_error_counts_and_names_ranks_and_arguments() -> None:
    values = {name: draw(np.float32, (8,), seed) for seed, name in enumerate(("a", "b", "c"))}
    same = [digest(value) for value in values.values()]
    odd = [same[0], digest(values["a"]), digest(values["a"])]
    with pytest.raises(ConfigError) as caught:
        refuse_different_inputs(Others(same, odd), values, "train")
    assert caught.value.message == "ranks give train different values of b and 1 more: rank 2's are not rank 0's"
    assert "seed alike" in caught.value.fix and "check_inputs=False" in caught.value.fix
