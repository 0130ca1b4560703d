"""Cutting and placing layers, against brute force."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np

from bactrian.passes.stages import layer_partitioning
from bactrian.passes.stages.layer_placement import LayerPlacement


def _best_cut(flops, anchors, crossing, num_groups, limit):
    """Least bytes over all cuts that `layer_partitioning.cut` may give, by trying them all."""
    best = None
    for cuts in itertools.combinations(range(1, len(flops)), num_groups - 1):
        starts = (0, *cuts, len(flops))
        for begin, end in itertools.pairwise(starts):
            weight = sum(anchors[begin:end])
            if weight == 0 or (weight > 1 and sum(flops[begin:end]) > limit * (1 + 1e-12)):
                break
        else:
            cost = sum(int(crossing[position]) for position in cuts)
            best = cost if best is None else min(best, cost)
    return best


def _random_program(seed):
    rng = random.Random(seed)
    num_ops = rng.randint(3, 12)
    anchors = [rng.random() < 0.5 for _ in range(num_ops)]
    flops = [rng.randint(5, 20) if anchor else rng.randint(0, 3) for anchor in anchors]
    values = []
    for op in range(num_ops):
        values.append((op, rng.randint(op, min(num_ops - 1, op + 4)), rng.randint(0, 9)))
    return rng, flops, anchors, layer_partitioning.cut_bytes(num_ops, values)


def test_cut_is_optimal_on_random_programs():
    solved = 0
    for seed in range(200):
        rng, flops, anchors, crossing = _random_program(seed)
        num_groups = rng.randint(1, 4)
        epsilon = rng.choice([0.0, 0.1, 0.5])
        found = layer_partitioning.cut(flops, anchors, crossing, num_groups, epsilon)
        if found is None:
            assert _best_cut(flops, anchors, crossing, num_groups, float("inf")) is None
            continue
        solved += 1
        limit = (1 + epsilon) * found.share
        best = _best_cut(flops, anchors, crossing, num_groups, limit)
        if best is None:  # relaxed: to the least limit that allows anything
            sums = sorted({sum(flops[a:b]) for a in range(len(flops)) for b in range(a + 1, len(flops) + 1)})
            limit = next(s for s in sums if _best_cut(flops, anchors, crossing, num_groups, s) is not None)
            best = _best_cut(flops, anchors, crossing, num_groups, limit)
        assert found.bytes == best
        assert found.bytes == sum(int(crossing[start]) for start in found.starts[1:])
    assert solved > 100


def test_cut_keeps_to_choices_and_is_optimal_among_them():
    solved = 0
    for seed in range(300):
        rng, flops, anchors, crossing = _random_program(seed)
        num_groups = rng.randint(1, 4)
        epsilon = rng.choice([0.0, 0.1, 0.5, 3.0])
        choices = [
            {rng.randrange(num_groups) for _ in range(num_groups)} if rng.random() < 0.3 else None for _ in flops
        ]
        found = layer_partitioning.cut(flops, anchors, crossing, num_groups, epsilon, choices=choices)
        costs = {}  # by the largest group that counts
        for cuts in itertools.combinations(range(1, len(flops)), num_groups - 1):
            starts = (0, *cuts, len(flops))
            groups = list(itertools.pairwise(starts))
            if any(sum(anchors[a:b]) == 0 for a, b in groups):
                continue
            if any(c is not None and k not in c for k, (a, b) in enumerate(groups) for c in choices[a:b]):
                continue
            largest = max((sum(flops[a:b]) for a, b in groups if sum(anchors[a:b]) > 1), default=0)
            cost = sum(int(crossing[position]) for position in cuts)
            costs[largest] = min(cost, costs.get(largest, cost))
        if found is None:
            assert not costs
            continue
        solved += 1
        limit = max((1 + epsilon) * sum(flops) / num_groups * (1 + 1e-9), min(costs))
        assert found.bytes == min(cost for largest, cost in costs.items() if largest <= limit)
        groups = found.group_of(len(flops))
        assert all(c is None or group in c for group, c in zip(groups, choices, strict=True))
    assert solved > 60


def test_cut_takes_the_most_even_of_the_cheapest():
    anchors = [True] * 9
    found = layer_partitioning.cut([1.0] * 8 + [8.0], anchors, np.full(10, 5), 5, 0.1)
    assert found is not None
    assert found.starts == (0, 2, 4, 6, 8)


def test_cut_keeps_to_the_allowed_positions():
    found = layer_partitioning.cut([1.0] * 8, [True] * 8, np.ones(9, dtype=np.int64), 2, 0.0, allowed=[3, 6])
    assert found is not None
    assert found.starts == (0, 3)
    assert found.largest == 5.0


def test_cut_of_ten_thousand_ops_is_fast():
    rng = np.random.default_rng(0)
    flops = rng.random(10_000)
    anchors = (rng.random(10_000) < 0.1).tolist()
    crossing = rng.integers(1, 1 << 30, 10_001)
    begin = time.process_time()
    assert layer_partitioning.cut(flops.tolist(), anchors, crossing, 64, 0.1) is not None
    assert time.process_time() - begin < 2.0


def test_cut_bytes_counts_a_value_once_per_position():
    assert layer_partitioning.cut_bytes(3, [(0, 2, 4), (1, 2, 3), (2, 2, 9)]).tolist() == [0, 4, 7, 0]


def test_normalized_order_moves_side_chains_to_their_reader():
    # cast_a, cast_b, dot_a(cast_a), metric(dot_a), dot_b(cast_b, dot_a), late(dot_a)
    operands = [[], [], [0], [2], [1, 2], [2]]
    anchors = [False, False, True, False, True, False]
    assert layer_partitioning.normalized_order(operands, anchors) == [0, 2, 3, 5, 1, 4]


def test_normalized_order_is_topological():
    for seed in range(100):
        rng = random.Random(seed)
        size = rng.randint(1, 30)
        operands = [[rng.randrange(op) for _ in range(rng.randint(0, 3))] if op else [] for op in range(size)]
        anchors = [rng.random() < 0.3 for _ in range(size)]
        order = layer_partitioning.normalized_order(operands, anchors)
        place = {op: position for position, op in enumerate(order)}
        assert sorted(order) == list(range(size))
        assert all(place[read] < place[op] for op in range(size) for read in operands[op])
        weight = [op for op in order if anchors[op]]
        assert weight == sorted(weight)


def test_placement_is_optimal_and_least_on_random_problems():
    for seed in range(200):
        rng = random.Random(seed)
        num_layers, num_nodes = rng.randint(1, 4), rng.randint(1, 5)
        unit = 1 << (seed % 4 * 25)  # prices of 64 bits, and of more
        problem = LayerPlacement(num_layers)
        nodes = [problem.node() for _ in range(num_nodes)]
        ends = nodes + [LayerPlacement.at(layer) for layer in range(num_layers)]
        for _ in range(rng.randint(1, 10)):
            problem.pay(rng.choice(ends), rng.choice(ends), rng.randint(1, 9) * unit)
        for _ in range(rng.randint(0, 3)):
            high, low = sorted(rng.sample(range(num_nodes + 1), 2))
            if low < num_nodes and high < num_nodes:
                problem.require(nodes[low], nodes[high])
        found = problem.solve()
        assert problem.holds(found)
        options = [list(choice) for choice in itertools.product(range(num_layers), repeat=num_nodes)]
        options = [choice for choice in options if problem.holds(choice)]
        least = min(problem.cost(choice) for choice in options)
        best = [choice for choice in options if problem.cost(choice) == least]
        assert problem.cost(found) == least
        assert found == [min(choice[node] for choice in best) for node in nodes]


def test_a_span_is_paid_once():
    problem = LayerPlacement(4)
    nodes = [problem.node() for _ in range(3)]
    problem.pay_span([*nodes, problem.at(1)], 10)
    for node, layer in zip(nodes, (0, 2, 3), strict=True):
        problem.pay_span([node, problem.at(layer)], 100)
    found = problem.solve()
    assert found[:3] == [0, 2, 3]
    assert problem.cost(found) == 30


def test_balance_is_optimal_on_random_layers():
    for seed in range(100):
        rng = random.Random(seed)
        size = rng.randint(1, 8)
        num_groups = rng.randint(1, size)
        weights = [rng.randint(1, 9) for _ in range(size)]
        crossing = [rng.randint(0, 9) for _ in range(size)]
        devices = [rng.choice([1, 2, 4]) if seed % 2 else 2 for _ in range(num_groups)]
        found = layer_partitioning.balance(weights, crossing, devices)

        def key(starts, weights=weights, crossing=crossing, devices=devices):
            ends = (*starts[1:], len(weights))
            largest = max(sum(weights[a:b]) / n for a, b, n in zip(starts, ends, devices, strict=True))
            return largest, sum(crossing[start] for start in starts[1:])

        options = [(0, *cuts) for cuts in itertools.combinations(range(1, size), num_groups - 1)]
        assert key(found) == min(map(key, options))
