"""Lists that are run in one process give the bits of the serial execution, with any schedule and dealing of stages."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from staged_programs import chain, chain_arguments, chain_functions, run_serially

from bactrian.passes.frame.errors import ConfigError, RuntimeFault
from bactrian.passes.schedules.by_name import SCHEDULES
from bactrian.runtime.control import SingleProcess
from bactrian.runtime.executor import Executor, Meter, run_together
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.timeline import Tracer, gather_traces, write_trace
from bactrian.runtime.transports.in_process import LocalNetwork


def executors(
    program: StagedProgram, ranks: tuple[int, ...], devices: list[int] | None = None, **more: Any
) -> list[Executor]:
    lists = build_streams(program, ranks)
    check_streams(lists)
    network, functions = LocalNetwork(), chain_functions(program.num_stages)
    where = devices or list(range(program.num_stages))
    return [
        Executor(
            one,
            functions,
            lambda slot: SingleDeviceSharding(jax.devices()[where[slot.stage]]),
            network.transport(one.rank),
            **more,
        )
        for one in lists
    ]


def pieces_of(runs: list[Executor], arguments: list[Any]) -> list[list[jax.Array]]:
    return [
        [jax.device_put(arguments[a.argument], e.places[a.slot], may_alias=False) for a in e.stream.arguments]
        for e in runs
    ]


def compare(runs: list[Executor], results: list[list[jax.Array]], expected: dict[tuple[int, int], Any]) -> None:
    by_result = {result: value for (result, _), value in expected.items()}
    seen: set[int] = set()
    for executor, arrays in zip(runs, results, strict=True):
        for piece, array in zip(executor.stream.results, arrays, strict=True):
            np.testing.assert_array_equal(np.asarray(array), by_result[piece.result], strict=True)
            assert array.sharding == executor.places[piece.slot]
            seen.add(piece.result)
    assert seen == set(by_result)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize(
    "ranks, devices",
    [
        ((0,), [0]),
        ((0, 1), [0, 1]),
        ((0, 0), [0, 0]),
        ((0, 0), [0, 1]),
        ((0, 1), [0, 0]),
        ((0, 1, 2, 3), [0, 1, 2, 3]),
        ((0, 1, 0, 1), [0, 1, 0, 1]),
        ((0, 0, 0, 0), [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("inline", [False, True])
def test_three_steps_equal_the_serial_ones(
    schedule: str, ranks: tuple[int, ...], devices: list[int], microbatches: int, inline: bool
) -> None:
    stages = len(ranks)
    program = chain(stages, microbatches, schedule)
    serial = chain_functions(stages, donate=False)
    arguments: list[Any] = list(chain_arguments(stages, microbatches))
    runs = executors(program, ranks, devices, inline=inline)
    pieces = pieces_of(runs, arguments)
    for _ in range(3):
        expected = run_serially(program, serial, arguments)
        results = run_together(runs, pieces, {stages + 1: arguments[-1]})
        compare(runs, results, expected)
        states = {
            (p.updates, p.stage): a
            for e, r in zip(runs, results, strict=True)
            for p, a in zip(e.stream.results, r, strict=True)
        }
        pieces = [[states[a.argument, a.stage] for a in e.stream.arguments] for e in runs]
        for (result, _), value in expected.items():
            if result <= stages:
                arguments[result] = value


def test_the_callers_batch_may_be_written_to_after_the_step() -> None:
    program = chain(2, 4)
    arguments = chain_arguments(2, 4)
    expected = run_serially(program, chain_functions(2, donate=False), arguments)
    runs = executors(program, (0, 1))
    batch = arguments[-1].copy()
    results = run_together(runs, pieces_of(runs, list(arguments)), {3: batch})
    batch[:] = np.nan
    compare(runs, results, expected)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (0, 1, 0, 1)])
def test_activations_really_held(schedule: str, ranks: tuple[int, ...]) -> None:
    stages, microbatches = 4, 8
    program, meter = chain(stages, microbatches, schedule), Meter()
    runs = executors(program, ranks, meter=meter)
    report = check_streams([e.stream for e in runs])
    run_together(runs, pieces_of(runs, list(chain_arguments(stages, microbatches))), {5: chain_arguments(4, 8)[-1]})
    for stage in range(stages):
        assert meter.in_flight[stage] == SCHEDULES[schedule].in_flight(stage, stages, microbatches)
    assert meter.in_flight == report.in_flight
    for rank, peak in meter.peak_bytes.items():
        assert 0 < peak <= report.peak_bytes[rank]


def test_one_list_of_several_can_not_run_alone() -> None:
    runs = executors(chain(2, 2), (0, 1))
    arguments = chain_arguments(2, 2)
    with pytest.raises(
        RuntimeFault, match=r"(?s)waits for other ranks of the process.*rank 1, step 0, instruction \d+: ARRIVE"
    ):
        runs[1].step(pieces_of(runs, list(arguments))[1], {3: arguments[-1]})


def test_a_missing_function_is_named() -> None:
    (one,) = build_streams(chain(1, 1), (0,))
    with pytest.raises(RuntimeFault, match=r"stage0\.initialize was not compiled"):
        Executor(one, {}, lambda slot: SingleDeviceSharding(jax.devices()[0]), LocalNetwork().transport(0))


def test_the_wrong_number_of_pieces_is_refused() -> None:
    (run,) = executors(chain(1, 1), (0,))
    with pytest.raises(RuntimeFault, match="got 0 argument pieces, the instruction stream has 2"):
        run.step([], {2: chain_arguments(1, 1)[-1]})


@pytest.mark.parametrize("place", ["missing/trace.json", "full"])
def test_a_trace_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "full"
    old.write_text("before")

    def write(self: Path, text: str, encoding: str) -> int:
        with open(self, "w", encoding=encoding) as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "full":
        monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(ConfigError, match=r"cannot write the trace .*: No (such file|space left)"):
        write_trace(tmp_path / place, [])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and old.read_text() == "before"


def test_trace(tmp_path: Path) -> None:
    tracer = Tracer()
    runs = executors(chain(2, 3), (0, 1), tracer=tracer)
    arguments = chain_arguments(2, 3)
    run_together(runs, pieces_of(runs, list(arguments)), {3: arguments[-1]})
    write_trace(tmp_path / "trace.json", gather_traces(tracer, SingleProcess()))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"stage0.forward m2", "stage1.forward_backward m0"} <= {e["name"] for e in events}
    starts = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    ends = {e["id"]: e["ts"] for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and all(starts[i] <= ends[i] for i in starts)
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == {(0, 0), (1, 1)}
