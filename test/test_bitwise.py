"""Any schedule, transport and timing gives the bits of the same stage functions run one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numerics import digest, run_serially
from test_launch import Command
from training_script import SCRIPT

import bactrian
from bactrian.driver.api import Parallelized
from bactrian.driver.run.compiled_step import Compiled
from bactrian.passes.schedules.by_name import SCHEDULES

NUM_STEPS = 3


def program() -> dict[str, Any]:
    """The names that the training script defines."""
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    return names


def serial(compiled: Compiled, state: Any, batch: Any) -> list[np.ndarray]:
    """Captured results, in order, of the very functions that the step runs, called one after another."""
    session = compiled.session
    homes = {call.function: session.devices[call.stage][0] for call in session.staged.program.calls}

    def plain(symbol: str) -> Callable[..., Sequence[Any]]:
        def call(*inputs: Any) -> Sequence[Any]:
            return session.functions[symbol]([jax.device_put(x, homes[symbol], may_alias=False) for x in inputs])

        return call

    leaves = [np.asarray(leaf) for leaf in compiled.captured.flatten((state, batch))]
    results = run_serially(session.staged.program, {symbol: plain(symbol) for symbol in homes}, leaves)
    return [results[info.number] for info in compiled.captured.results]


def check(step: Parallelized, state: Any, batch: Any) -> str:
    """Each step against the serial run from the same state; the digest of the last result."""
    result: Any = None
    for _ in range(NUM_STEPS):
        host = bactrian.gather(state)
        result = step(state, batch)
        state = result[0]
        expected = serial(step.compiled, host, batch)
        for ours, theirs in zip(jax.tree.leaves(bactrian.gather(result)), expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return digest(bactrian.gather(result))


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_in_one_process(monkeypatch: pytest.MonkeyPatch, schedule: str, num_devices: int) -> None:
    devices = jax.local_devices()[:num_devices]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    names = program()
    step = names["make"](num_stages=4, num_microbatches=4, schedule=schedule)
    check(step, names["state"], names["batch"])
    assert len(step.compiled.session.streams) == num_devices
    assert {device for mesh in step.compiled.session.devices.values() for device in mesh} == set(devices)


OVER_MPI = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from numerics import digest

def run(num_stages, schedule, state):
    step = make(num_stages=num_stages, num_microbatches=4, schedule=schedule)
    for _ in range({NUM_STEPS}):
        result = step(state, batch)
        state = result[0]
    print("digest", num_stages, schedule, digest(bactrian.gather(result)), flush=True)

"""


@pytest.mark.mpi
def test_over_mpi(tmp_path: Path) -> None:
    """Two and four stages on two ranks, all in one job; each rank prints the digest of what it gathered."""
    plans = [(num_stages, schedule) for num_stages in (2, 4) for schedule in SCHEDULES]
    calls = "".join(f"run({num_stages}, {schedule!r}, state)\n" for num_stages, schedule in plans)
    job = Command(tmp_path, script=SCRIPT + OVER_MPI + calls).ended(start_seconds=90)
    assert job.code == 0, job.err
    expected = list[str]()
    for num_stages, schedule in plans:
        names = program()
        step = names["make"](num_stages=num_stages, num_microbatches=4, schedule=schedule)
        expected += [f"digest {num_stages} {schedule} {check(step, names['state'], names['batch'])}"] * 2
    assert sorted(line for line in job.out.splitlines() if "digest" in line) == sorted(expected)
