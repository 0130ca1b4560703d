"""Python time per instruction of the executor, with stage functions that do nothing and no devices to wait for."""
# ruff: noqa: E402 (paths and cores come before imports)

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "test")]

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from staged_programs import chain

from bactrian.runtime.executor import Executor, run_together
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instructions import Run
from bactrian.runtime.transports.in_process import LocalNetwork


def main(stages: int = 4, microbatches: int = 32, steps: int = 20) -> None:
    """Print microseconds per instruction, with calls that give ready-made arrays, moves on one device included."""
    lists = build_streams(chain(stages, microbatches), tuple(range(stages)))
    network, device = LocalNetwork(), SingleDeviceSharding(jax.devices()[0])
    ready = jax.device_put(np.float32(0), device)
    counts = {x.function: len(x.outputs) for one in lists for x in one.instructions if isinstance(x, Run)}
    functions = {name: (lambda arrays, made=[ready] * n: made) for name, n in counts.items()}
    runs = [Executor(one, functions, lambda slot: device, network.transport(one.rank)) for one in lists]
    pieces = [[ready] * len(one.arguments) for one in lists]
    batch = {stages + 1: jax.device_put(np.zeros((2 * microbatches, 8), np.float32), device)}
    best = busy = float("inf")
    for _ in range(steps):
        begin, cpu = time.perf_counter(), time.thread_time()
        run_together(runs, pieces, batch)
        best, busy = min(best, time.perf_counter() - begin), min(busy, time.thread_time() - cpu)
    total = sum(len(one.instructions) for one in lists)
    print(
        f"{total} instructions in {best * 1e3:.2f} ms: {best / total * 1e6:.2f} us per instruction "
        f"({busy / total * 1e6:.2f} us of processor time)"
    )


main()
