"""Mutated modules, plans, clusters and problems: taken, or refused with what is wrong; no bug of ours, no hang, no abort."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().with_name("mutated_inputs.py")
SEED = 17


def failures(kind: str, first: int, count: int, seed: int = SEED) -> list[dict[str, str]]:
    """The cases that ended as no input may end."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(seed), str(first), str(count)],
        capture_output=True,
        text=True,
        check=True,
    )
    *failed, ends = map(json.loads, done.stdout.splitlines())
    assert sum(ends["ends"].values()) == count
    return failed


def report(failed: list[dict[str, str]]) -> str:
    """What to look at first."""
    return "\n\n".join(
        f"case {each['number']} ended with {each['ended']}: {' '.join(each['words'])}\n{each['err']}"
        for each in failed[:5]
    )


@pytest.mark.parametrize(
    ("kind", "count"), [("ir", 40), ("step", 8), ("plan", 15), ("saved", 5), ("cluster", 10), ("problem", 12)]
)
def test_mutated_inputs(kind: str, count: int) -> None:
    failed = failures(kind, 0, count)
    assert not failed, report(failed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "count"), [("ir", 2000), ("step", 500), ("plan", 300), ("saved", 200), ("cluster", 200), ("problem", 200)]
)
def test_many_mutated_inputs(kind: str, count: int) -> None:
    failed = failures(kind, 1000, count)
    assert not failed, report(failed)


@pytest.mark.parametrize(
    ("command", "patience", "ended"),
    [
        ("{}['x']", 60, "1"),
        ("os.abort()", 60, "SIGABRT"),
        ("time.sleep(60)", 0.5, "hang"),
        ("[0 for _ in iter(int, 1)]", 60, "SIGXCPU"),
        ("0", 60, "0"),
    ],
)
def test_failures_are_seen(tmp_path: Path, command: str, patience: float, ended: str) -> None:
    program = (
        f"import os, sys, time, pathlib, mutated_inputs as inputs; inputs.SECONDS, inputs.PATIENCE = 1, {patience}; "
        f"case = inputs.Case((), 'text', lambda words: {command}, 'x'); "
        "found, err = inputs.run(case, pathlib.Path(sys.argv[1])); print(found, inputs.is_sound(found, err))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=SCRIPT.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [ended, str(ended == "0")]
