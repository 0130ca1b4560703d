"""Compiling one stage function and timing it on this process's devices: what a process of its own does for the profiler."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from bactrian.driver.profile.function_profile import FunctionFailure, FunctionProfile, Measured
from bactrian.driver.xla.compile_stage import compile_measured, signature_avals, signature_shardings
from bactrian.runtime.rank_lifecycle import keep_memory

_LEAST_RUNS, _MOST_RUNS = 3, 100
_VALUES = 1 << 16  # different ones, repeated in larger arrays


@dataclass(frozen=True)
class TimedFunction:
    """What a process is asked to time.

    Attributes:
        text: the function's module.
        num_devices: of its mesh.
        num_cores: that its devices have together; 0 where they are no cores.
        seconds: to measure for, once it is compiled and has run a first time.
    """

    text: str
    num_devices: int
    num_cores: int
    seconds: float


def time_function(function: TimedFunction) -> Measured:
    """Compile a function and run it on made-up values; the median of its runs counts.

    Where it is asked for cores, only the first function of a process can be: jax takes its threads from them once.
    """
    if function.num_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: function.num_cores])
    keep_memory()
    devices = jax.local_devices()[: function.num_devices]
    try:
        call, memory = compile_measured(function.text, devices)
        shardings, _ = signature_shardings(function.text, devices)
        avals, aliases = signature_avals(function.text)
        arguments = [
            jax.device_put(_values(aval.shape, aval.dtype), sharding)
            for aval, sharding in zip(avals, shardings, strict=True)
        ]

        def runs() -> Iterator[float]:
            while True:
                start = time.perf_counter()
                results = jax.block_until_ready(call(arguments))
                yield time.perf_counter() - start
                for number, result in aliases.items():  # its buffer is gone
                    arguments[number] = results[result]

        return FunctionProfile(_median(runs(), function.seconds), memory)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        return FunctionFailure(reason, may_pass=reason.startswith("RESOURCE_EXHAUSTED"))


def _median(runs: Iterator[float], seconds: float) -> float:
    """Of runs that take so many seconds together; the first is not counted."""
    next(runs)
    counted = list[float]()
    while len(counted) < _LEAST_RUNS or (sum(counted) < seconds and len(counted) < _MOST_RUNS):
        counted.append(next(runs))
    return statistics.median(counted)


def _values(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros for what may be an index; else small numbers above zero, so that nothing overflows or becomes rare."""
    if not jax.numpy.issubdtype(dtype, np.floating):
        return np.zeros(shape, dtype)
    block = np.random.default_rng(0).uniform(0.01, 0.02, _VALUES).astype(dtype)
    return np.resize(block, shape)
