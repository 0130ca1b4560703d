"""Where blocks repeat, and cuts that keep them equal."""

from __future__ import annotations

import numpy as np
import pytest

from bactrian.passes.stages.repeated_blocks import RepeatedRun, block_cuts, repeated_runs


@pytest.mark.parametrize(
    ("keys", "runs"),
    [
        ("eqkvqkvqkvh", [RepeatedRun(1, 9, 3)]),
        ("abcd", []),
        ("aaaa", [RepeatedRun(0, 4, 1)]),  # of periods that weigh the same, the shortest
        ("qqqoqqqo", [RepeatedRun(0, 8, 4)]),  # not three times q
        ("abababxyzxyzxyz", [RepeatedRun(0, 6, 2), RepeatedRun(6, 9, 3)]),
        ("", []),
    ],
)
def test_runs_are_found(keys: str, runs: list[RepeatedRun]) -> None:
    assert repeated_runs(keys, range(len(keys)), [1.0] * len(keys)) == runs


def test_blocks_with_other_ops_between_their_anchors_are_no_run() -> None:
    assert repeated_runs("aaaa", [0, 1, 2, 3], [1.0] * 4) == [RepeatedRun(0, 4, 1)]
    assert repeated_runs("aaaa", [0, 1, 3, 4], [1.0] * 4) == [RepeatedRun(0, 4, 2)]
    assert repeated_runs("abab", [0, 1, 5, 9], [1.0] * 4) == []


def test_the_run_with_the_most_weight_is_found_first() -> None:
    # bcb is a run of period 2 with bc, and of weight 1 each; the heavy a's are one as well.
    assert repeated_runs("aabbb", range(5), [5.0, 5.0, 1.0, 1.0, 1.0]) == [RepeatedRun(0, 2, 1), RepeatedRun(2, 3, 1)]


def test_cuts_are_at_one_place_of_each_block() -> None:
    # Ops: e, then three blocks of an anchor and two light ops, of which the middle position is the cheapest, then h.
    places = [0, 1, 4, 7, 10]
    crossing = np.array([0, 9, 9, 9, 5, 9, 9, 5, 9, 9, 5, 0])
    cuts = block_cuts([RepeatedRun(1, 3, 1)], places, crossing)
    assert cuts.between == (1, 4, 7, 10)
    assert cuts.within == ()


def test_cuts_within_blocks_are_those_where_no_more_crosses() -> None:
    # Two anchors in each of three blocks; as much crosses behind the first one as behind the second.
    places = [0, 1, 2, 3, 4, 5]
    cuts = block_cuts([RepeatedRun(0, 6, 2)], places, np.array([0, 4, 4, 4, 4, 4, 0]))
    assert (cuts.between, cuts.within) == ((2, 4), (1, 3, 5))
    cuts = block_cuts([RepeatedRun(0, 6, 2)], places, np.array([0, 8, 4, 8, 4, 8, 0]))
    assert (cuts.between, cuts.within) == ((2, 4), ())


def test_outside_of_runs_cuts_are_anywhere() -> None:
    cuts = block_cuts([], [0, 2], np.array([0, 3, 3, 3, 0]))
    assert cuts.between == (1, 2, 3)
