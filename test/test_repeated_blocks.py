"""Where blocks repeat, and cuts that keep them equal."""

from __future__ import annotations

import numpy as np
import pytest

from bactrian.passes.stages.repeated_blocks import (
    OpsInOrder,
    RepeatedRun,
    RunCuts,
    allowed_cuts,
    block_layers,
    repeated_runs,
    run_cuts,
)


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
    (cuts,) = run_cuts([RepeatedRun(1, 3, 1)], places, crossing)
    assert cuts.between == cuts.within == (1, 4, 7, 10)
    assert allowed_cuts([cuts], 11) == [1, 4, 7, 10]


def test_cuts_within_blocks_are_those_where_no_more_crosses() -> None:
    # Two anchors in each of three blocks; as much crosses behind the first one as behind the second.
    places = [0, 1, 2, 3, 4, 5]
    (cuts,) = run_cuts([RepeatedRun(0, 6, 2)], places, np.array([0, 4, 4, 4, 4, 4, 0]))
    assert (cuts.between, cuts.within) == ((0, 2, 4, 6), tuple(range(7)))
    (cuts,) = run_cuts([RepeatedRun(0, 6, 2)], places, np.array([0, 8, 4, 8, 4, 8, 0]))
    assert (cuts.between, cuts.within) == ((0, 2, 4, 6), (0, 2, 4, 6))
    assert allowed_cuts([cuts], 6) == [2, 4]


def test_outside_of_runs_cuts_are_anywhere() -> None:
    assert allowed_cuts([], 4) == [1, 2, 3]
    assert allowed_cuts([RunCuts((2, 4), (2, 4))], 6) == [1, 2, 4, 5]


def layers(weights: list[float], cuts: list[RunCuts], most: int) -> list[int]:
    num_ops = len(weights)
    ops = OpsInOrder(weights, [True] * num_ops, np.ones(num_ops + 1, np.int64))
    return block_layers(cuts, ops, most)


def test_each_block_is_a_layer_and_so_is_what_weighs_as_much() -> None:
    cuts = [RunCuts((1, 3, 5), (1, 2, 3, 4, 5))]  # an op, two blocks of two, an op
    assert layers([1.0] * 6, cuts, 4) == [0, 1, 3, 5]
    assert layers([0.01, 1, 1, 1, 1, 0.01], cuts, 4) == [0, 3]  # the light ops go with the blocks beside them
    assert layers([1.0, 1, 1, 1, 1, 0.01], cuts, 4) == [0, 1, 3]
    assert layers([5.0] + [1.0] * 5, [RunCuts((1, 3, 5), (1, 3, 5))], 4) == [0, 1, 3, 5]  # an op can't be cut


def test_parts_of_blocks_are_layers_where_there_are_few() -> None:
    cuts = [RunCuts((1, 3, 5), (1, 2, 3, 4, 5))]
    assert layers([1.0] * 6, cuts, 8) == [0, 1, 2, 3, 4, 5]


def test_several_blocks_are_a_layer_where_there_are_many() -> None:
    starts = tuple(range(1, 14))  # of twelve blocks
    assert layers([1.0] * 14, [RunCuts(starts, starts)], 4) == [0, 1, 5, 9, 13]


def test_what_lies_between_runs_is_cut_by_its_weight() -> None:
    # Blocks of weight 2, then four ops of 2 each, then blocks again.
    weights = [1.0] * 4 + [2.0] * 4 + [1.0] * 4
    cuts = [RunCuts((2, 4), (2, 4)), RunCuts((8, 10), (8, 10))]
    assert layers(weights, cuts, 6) == [0, 2, 4, 5, 6, 7, 8, 10]


def test_without_blocks_layers_are_even() -> None:
    assert layers([1.0] * 8, [], 4) == [0, 2, 4, 6]
    assert layers([1.0], [], 4) == [0]
