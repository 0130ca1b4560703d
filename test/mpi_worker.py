"""What the tests start under mpirun: a few steps of `chain`, one stage or more per rank. Usage: stages microbatches."""
# ruff: noqa: E402 (paths and cores come before imports)

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from bactrian.runtime.rank_lifecycle import prepare, start_mpi

prepare()

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from staged_programs import chain, chain_arguments, chain_functions, run_serially

from bactrian.runtime import faults
from bactrian.runtime.control import MpiControl
from bactrian.runtime.executor import Executor
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams
from bactrian.runtime.timeline import Tracer, gather_traces, write_trace
from bactrian.runtime.transports.mpi import MpiTransport


def main() -> None:
    comm = start_mpi()
    stages, microbatches, steps = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    program = chain(stages, microbatches)
    faults.at("plan")
    lists = build_streams(program, tuple(s % comm.Get_size() for s in range(stages)))
    check_streams(lists)
    faults.at("compile")
    part_bytes = 20 if "--parts" in sys.argv else 1 << 30  # 20 do not divide the messages, nor their elements
    transport = MpiTransport(comm, helper="--poll" not in sys.argv, part_bytes=part_bytes)
    sys.argv = [a for a in sys.argv if a not in ("--poll", "--parts")]
    tracer = Tracer() if len(sys.argv) > 4 else None
    run = Executor(
        lists[comm.Get_rank()],
        chain_functions(stages),
        lambda slot: SingleDeviceSharding(jax.devices()[0]),
        transport,
        tracer=tracer,
    )
    arguments = list(chain_arguments(stages, microbatches))
    pieces = [jax.device_put(arguments[a.argument], may_alias=False) for a in run.stream.arguments]
    serial = chain_functions(stages, donate=False)
    for _ in range(steps):
        results = run.step(pieces, {stages + 1: arguments[-1]})
        expected = {result: x for (result, _), x in run_serially(program, serial, arguments).items()}
        for piece, array in zip(run.stream.results, results, strict=True):
            np.testing.assert_array_equal(np.asarray(array), expected[piece.result], strict=True)
        states = {(p.updates, p.stage): a for p, a in zip(run.stream.results, results, strict=True)}
        pieces = [states[a.argument, a.stage] for a in run.stream.arguments]
        arguments = [*(expected[i] for i in range(stages + 1)), arguments[-1]]
    faults.at("save")
    if tracer is not None or steps != 2:  # else the interpreter's end has to do it
        transport.close()
    if tracer is not None:
        events = gather_traces(tracer, MpiControl(comm))
        if comm.Get_rank() == 0:
            write_trace(sys.argv[4], events)
    print(f"rank {comm.Get_rank()} done", flush=True)


main()
