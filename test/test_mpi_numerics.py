"""A step over several processes equals one device: one launch for each number of ranks, with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import numerics
import pytest
from traps import TRAPS
from xla_flags import QUICK

from bactrian.passes.schedules.by_name import SCHEDULES

HERE = Path(__file__).parent
DEADLINE_SECONDS = 1800
LONG_ROWS = 32  # of the whole product, in one launch
MODELS_COVER = ("mlp/plain", "gpt-tied-dropout/linen", "conv/linen")  # a trap has values that go to several stages
SOME_TRAPS = (
    "tied-three-stages",
    "value-read-by-three-layers",
    "stage-without-output",
    "aux-outputs",
    "skip-not-finite",
)

pytestmark = pytest.mark.mpi


def feasible(row: numerics.Row) -> bool:
    """Each rank has a stage; with two ranks, three and four stages are more stages than ranks."""
    return row.get("stages", 4) >= row.get("ranks", 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A launch for each number of ranks; with ``--long``, many with a part of the whole product each."""
    if "todo" in metafunc.fixturenames:
        long = bool(metafunc.config.getoption("--long", default=False))
        launches = dict[str, tuple[int, list[Any]]]()
        for ranks in (2, 4):
            rows = entries(ranks, long)
            size = LONG_ROWS if long else len(rows)
            launches.update({f"{ranks}-{at}": (ranks, rows[at : at + size]) for at in range(0, len(rows), size)})
        metafunc.parametrize(("ranks", "todo"), launches.values(), ids=launches)


def entries(ranks: int, long: bool) -> list[Any]:
    """The rows of the cover for so many ranks (or of the whole product), and some traps."""
    factors: dict[str, tuple[Any, ...]] = {
        "model": tuple(models.MODELS) if long else MODELS_COVER,
        "microbatches": (1, 2, 4, 8) if long else (1, 2, 8),
        "optimizer": tuple(models.OPTIMIZERS),
        "loss": ("mean", "sum"),
        "stages": (2, 3, 4),
        "schedule": tuple(SCHEDULES),
        "ranks": (2, 4),
    }
    rows = (numerics.product if long else numerics.pairwise_cover)(factors, feasible)
    chosen = [{key: row[key] for key in row if key != "ranks"} for row in rows if row["ranks"] == ranks]
    built = {case.name: case.make() for case in TRAPS if case.name in SOME_TRAPS}
    return chosen + [name for name in SOME_TRAPS if built[name].options["num_stages"] >= ranks]


def launch(arguments: list[str], cases: Path) -> list[dict[str, Any]]:
    """Run the script in a child process of its own group, and return its JSON lines."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment["XLA_FLAGS"] = " ".join(QUICK)  # the launcher adds the devices
    command = [
        sys.executable,
        "-m",
        "bactrian.driver.cli",
        "run",
        *arguments,
        str(HERE / "mpi_numerics.py"),
        str(cases),
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"no end after {DEADLINE_SECONDS} s; the last lines were\n{out[-2000:]}\n{err[-2000:]}")
    assert process.returncode == 0, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def test_equals_one_device(ranks: int, todo: list[Any], tmp_path: Path) -> None:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(todo))
    *lines, last = launch(["-n", str(ranks)], cases)
    assert last == {"done": ranks}
    assert len(lines) == len(todo)
    problems = [f"{line['case']}: {line['problem']}" for line in lines if line["problem"]]
    assert not problems, "\n".join(problems)
