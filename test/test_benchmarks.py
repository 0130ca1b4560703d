"""The arithmetic of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bactrian.runtime.instructions import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pipeline
import worker


def run(function: str, microbatch: int) -> Run:
    stage, phase = function.removeprefix("stage").split(".")
    return Run(function, int(stage), phase.partition("_1")[0], microbatch, (), ())


def test_ideal_is_the_schedule_without_overheads() -> None:
    first = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("update", -1), ("update_1", -1)]
    last = [("forward_backward", 0), ("forward_backward", 1), ("update", -1)]
    lists = [[run(f"stage{s}.{phase}", m) for phase, m in order] for s, order in enumerate((first, last))]
    seconds = {"stage0.forward": 1.0, "stage0.backward": 1.0, "stage1.forward_backward": 2.0}
    seconds |= {"stage0.update": 0.5, "stage0.update_1": 0.25, "stage1.update": 2.0}
    assert worker.ideal_seconds(lists, seconds) == 7.25  # B1 ends at 6; the second round waits for stage 1, until 7
    with pytest.raises(ValueError, match="order"):
        worker.ideal_seconds([lists[0][::-1], lists[1]], seconds)


def test_interval_holds_the_median_of_paired_quotients() -> None:
    base = np.linspace(1.0, 2.0, 9)
    assert pipeline.interval([2 * base, base], pipeline.ratio) == (2.0, 2.0, 2.0)
    value, low, high = pipeline.interval([base])
    assert low < value < high
