"""How much of a two-rank 1F1B step is lost to messages: 1 MB values, 4 ms forwards, 8 ms backwards, a core per rank.

Run under mpirun with two ranks. Prints the step's time over the time of the same calls without any message.
"""
# ruff: noqa: E402 (paths and cores come before imports)

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

from bactrian.runtime.rank_lifecycle import prepare, start_mpi

prepare()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from bactrian.passes.schedules.gpipe import GPipe
from bactrian.runtime.executor import Executor
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.staged_program import ArgumentPiece, Call, StagedProgram, Transfer, Value
from bactrian.runtime.transports.mpi import MpiTransport

MICROBATCHES, SHAPE = 12, (256, 1024)


def program() -> StagedProgram:
    """x -> stage 0 -> y -> stage 1 (forward, backward) -> g -> stage 0, as 1F1B."""
    stages = (0, 0, 1, 1, 1, 0, 0)
    values = tuple(Value(i, stage, SHAPE, "float32", True) for i, stage in enumerate(stages))
    calls = (
        Call("forward", 0, "forward", 0, (0,), (1,)),
        Call("forward", 1, "forward", 0, (2,), (3,)),
        Call("backward", 1, "backward", 0, (3,), (4,)),
        Call("backward", 0, "backward", 0, (5,), (6,)),
    )
    order = tuple(
        tuple(t for m in range(MICROBATCHES) for t in ([f"F{m}", f"B{m}"] if s else [f"F{m + 2}", f"B{m}"]))
        for s in range(2)
    )
    first = ("F0", "F1", *(t for t in order[0] if not (t[0] == "F" and int(t[1:]) >= MICROBATCHES)))
    assert sorted(first) == sorted(GPipe().order(1, MICROBATCHES)[0])
    moves = (Transfer(1, 2), Transfer(4, 5))
    batch = (ArgumentPiece(0, "batch", 0),)
    return StagedProgram(2, MICROBATCHES, "1f1b", values, calls, moves, batch, (), (first, order[1]))


def work(repeats: int):
    """A call of about `repeats` matrix products."""

    def function(x: jax.Array) -> jax.Array:
        for _ in range(repeats):
            x = jnp.tanh(x @ jnp.full((SHAPE[1], 64), 1e-3)) @ jnp.full((64, SHAPE[1]), 1e-3)
        return x

    compiled = jax.jit(function)
    return lambda arrays: [compiled(*arrays)]


def main() -> None:
    """Every mode in turn, several rounds, the best step of each; "alone" are the same calls without messages."""
    comm = start_mpi()
    x = jax.device_put(np.ones(SHAPE, np.float32))
    quick = work(4)
    quick([x])[0].block_until_ready()
    once = min(timed(lambda: quick([x])[0].block_until_ready()) for _ in range(12)) / 4
    repeats = comm.bcast(max(1, round(4e-3 / once)))
    functions = {"forward": work(repeats), "backward": work(2 * repeats)}
    one = build_streams(program(), (0, 1))[comm.Get_rank()]
    batch = {0: jax.device_put(np.ones((SHAPE[0] * MICROBATCHES, SHAPE[1]), np.float32))}

    def alone() -> None:
        calls = [functions["forward"], functions["backward"]] * MICROBATCHES
        for call in (*calls, functions["forward"], functions["backward"]):
            (last,) = call([x])  # memory is used again, as in a step
        last.block_until_ready()

    def step(helper: bool, nap: float) -> Callable[[], None]:
        transport = MpiTransport(comm, helper=helper, nap_seconds=(min(nap, 0.5e-3), nap))
        run = Executor(one, functions, lambda slot: SingleDeviceSharding(jax.devices()[0]), transport)

        def function() -> None:
            run.step([], batch)
            transport.flush()

        return function

    modes = {"alone": alone}
    for nap in (200, 1000, 4000):
        modes |= {
            f"{'helper' if helper else 'polling'}, nap {nap} us": step(helper, nap * 1e-6) for helper in (True, False)
        }
    wall = {name: [] for name in modes}
    busy = {name: [] for name in modes}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 12):
        for name, function in modes.items():
            comm.Barrier()
            begin, cpu = time.perf_counter(), time.process_time()
            function()
            comm.Barrier()
            wall[name].append(max(comm.allgather(time.perf_counter() - begin)))
            busy[name].append(max(comm.allgather(time.process_time() - cpu)))
    if comm.Get_rank() == 0:
        for name in modes:
            ratio = min(busy[name]) / min(busy["alone"])
            median = sorted(wall[name])[len(wall[name]) // 2]
            print(
                f"{name:22} {min(wall[name]) * 1e3:6.1f} ms, median {median * 1e3:6.1f}, "
                f"processor {min(busy[name]) * 1e3:6.1f} ms, ratio {ratio:.3f}",
                flush=True,
            )


def timed(function) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


main()
