"""Specs, strategies and the cost network, by numbers; the solver against every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from jaxlib.mlir import ir
from jaxlib.mlir.passmanager import PassManager

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.meshes import sharding_attribute
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.spec import Spec, parse_axes
from bactrian.passes.network.solver import solve
from bactrian.passes.sharding.sharding_model import (
    ShardedOp,
    ShardingModel,
    ShardingProblem,
    Shardings,
    Tensor,
    step_seconds,
)
from bactrian.passes.sharding.strategies import strategies
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.reshard_paths import ReshardStep, ReshardTable, all_specs
from bactrian.passes.spmd.sharding_rules import Rule, elementwise, replicated_rule

TWO = Mesh((Axis("x", 2, 1e-6, 1e-9), Axis("y", 4, 2e-6, 1e-10)))
EQUAL = Mesh((Axis("x", 2, 1e-6, 1e-9), Axis("y", 2, 2e-6, 1e-10)))
DOT = Rule((64, 32, 16), (((0,), (1,)), ((1,), (2,))), (((0,), (2,)),), frozenset({1}))


def test_mesh_text() -> None:
    assert parse_axes("data=2, model=4") == (("data", 2), ("model", 4))
    for text in ("", "data", "data=2,,", "2=data", "data=-1"):
        with pytest.raises(ConfigError, match="list of axes"):
            parse_axes(text)


@pytest.mark.parametrize(
    "axes",
    [
        (Axis("a", 0),),
        (Axis("a", 2), Axis("a", 2)),
        (Axis("a", 2, latency=math.nan),),
        (Axis("a", 2, seconds_per_byte=-1.0),),
        (Axis("a", 2, seconds_per_byte=math.inf),),
    ],
)
def test_a_mesh_without_meaning_is_refused(axes: tuple[Axis, ...]) -> None:
    with pytest.raises(ConfigError):
        Mesh(axes)


def test_specs_split_evenly() -> None:
    assert len(all_specs((8, 8), TWO)) == 1 + 2 + 2 + 2 + 2 + 2  # none; x; y; one each; both, in two orders
    assert all_specs((2, 3), TWO) == [Spec(((), ())), Spec((("x",), ()))]  # y is wider than 2, nothing divides 3
    assert all_specs((8,), Mesh((Axis("x", 1),))) == [Spec(((),))]


def test_seconds_of_single_steps() -> None:
    table = ReshardTable((8, 8), 1024.0, TWO)
    number = table.number
    seconds = table.seconds
    none, x, y = (number[Spec.parse(text)] for text in ("-,-", "x,-", "y,-"))
    assert seconds[none, x] == 0.0
    assert seconds[x, none] == pytest.approx(1e-6 + 512 * 1e-9)
    assert seconds[y, none] == pytest.approx(2e-6 + 3 * 256 * 1e-10)
    assert seconds[y, number[Spec.parse("-,y")]] == pytest.approx(2e-6 + 3 / 4 * 256 * 1e-10)


@pytest.mark.parametrize("mesh", [TWO, EQUAL], ids=["2x4", "2x2"])
def test_paths_are_shortest_and_add_up(mesh: Mesh) -> None:
    table = ReshardTable((16, 16, 16), 16384.0, mesh)
    seconds = table.seconds
    assert np.isfinite(seconds).all()
    assert (seconds[:, :, None] <= seconds[:, None, :] + seconds.T[None, :, :] + 1e-15).all()
    for source, target in itertools.product(table.specs, repeat=2):
        steps = table.path(source, target)
        assert (steps[-1].target if steps else source) == target
        cost = sum(step.seconds for step in steps)
        assert cost == pytest.approx(seconds[table.number[source], table.number[target]], abs=1e-15)


@pytest.mark.parametrize("mesh", [TWO, EQUAL], ids=["2x4", "2x2"])
def test_each_step_is_one_collective_of_shardy(mesh: Mesh) -> None:
    """``sdy-reshard-to-collectives`` turns a reshard from before to after a step into that collective."""
    table = ReshardTable((16, 16, 16), 16384.0, mesh)
    steps = dict[tuple[int, int], ReshardStep]()
    for source, target in itertools.product(range(len(table.specs)), repeat=2):
        at = table.specs[source]
        for step in table.path(at, table.specs[target]):
            steps[table.number[at], table.number[step.target]] = step
            at = step.target
    kinds = {"slice": "all_slice"}
    sizes = ", ".join(f'"{axis.name}"={axis.size}' for axis in mesh.axes)
    with make_context():
        lines = [f"sdy.mesh @m = <[{sizes}]>"]
        for source, target in steps:
            before, after = (sharding_attribute(table.specs[n], "m") for n in (source, target))
            short = str(after).removeprefix("#sdy.sharding")
            lines.append(
                f"func.func @f{source}_{target}(%a: tensor<16x16x16xf32> {{sdy.sharding = {before}}}) -> tensor<16x16x16xf32> {{"
            )
            lines.append(f"%0 = sdy.reshard %a {short} : tensor<16x16x16xf32>\nreturn %0 : tensor<16x16x16xf32>\n}}")
        module = ir.Module.parse("\n".join(lines))
        PassManager.parse("builtin.module(func.func(sdy-reshard-to-collectives))").run(module.operation)
        functions = [view.operation for view in module.body.operations if view.operation.name == "func.func"]
        found = [[op.operation.name for op in f.regions[0].blocks[0].operations][:-1] for f in functions]
    assert found == [[f"sdy.{kinds.get(step.kind, step.kind)}"] for step in steps.values()]


def test_strategies_of_a_product() -> None:
    found = strategies(DOT, (64 * 16 * 4.0,), TWO)
    assert found[0].factors == (None, None)
    assert found[0].num_shards == 1
    by_factors = dict[tuple[int | None, ...], list[tuple[tuple[str, ...], ...]]]()
    for strategy in found:
        by_factors.setdefault(strategy.factors, []).append(tuple(r.axes for r in strategy.reductions))
    assert len(by_factors) == 16
    assert len(by_factors[0, 2]) == 1  # nothing is reduced
    assert len(by_factors[1, None]) == 3  # everywhere, or scattered into either dim
    assert len(by_factors[1, 1]) == 5  # everywhere, or along each axis into either dim
    both = next(s for s in found if s.factors == (1, 2))
    assert [str(spec) for spec in both.operands] == ["-,x", "x,y"]
    assert both.partial == (Spec(((), ("y",))),)
    (reduction,) = both.reductions
    assert reduction.kind == "all_reduce"
    assert reduction.seconds == pytest.approx(1e-6 + 2 * 0.5 * 64 * 16 * 4 / 4 * 1e-9)


def test_a_scatter_leaves_less_for_the_next() -> None:
    found = strategies(DOT, (4096.0,), TWO)
    strategy = next(s for s in found if s.factors == (1, 1) and s.results == (Spec.parse("y,x"),))
    first, second = strategy.reductions
    assert (first.kind, first.axes, first.nbytes) == ("reduce_scatter", ("x",), 1 / 2 * 4096)
    assert (second.kind, second.axes, second.nbytes) == ("reduce_scatter", ("y",), 3 / 4 * 2048)


def test_one_all_reduce_over_two_axes() -> None:
    found = strategies(DOT, (4096.0,), TWO)
    (reduction,) = next(s for s in found if s.factors == (1, 1) and s.results == (Spec.replicated(2),)).reductions
    assert (reduction.kind, reduction.axes, reduction.nbytes) == ("all_reduce", ("x", "y"), 2 * 7 / 8 * 4096)
    fast_then_slow = 2 * 3 / 4 * 4096 * 1e-10 + 2 * 1 / 2 * 1024 * 1e-9
    assert reduction.seconds == pytest.approx(2e-6 + fast_then_slow)


def test_no_spec_has_strides() -> None:
    """``[8, 4] -> [32]``: the minor factor is cut only where the major one is cut to pieces of one."""
    rule = Rule((2, 16), (((0,), (1,)),), (((0, 1),),))
    found = {strategy.factors: strategy.results for strategy in strategies(rule, (128.0,), TWO)}
    assert found == {
        (None, None): (Spec(((),)),),
        (0, None): (Spec((("x",),)),),
        (0, 1): (Spec((("x", "y"),)),),
    }


def test_what_is_needed_whole_is_not_cut() -> None:
    rule = Rule((8, 8), (((0,), (1,)),), (((0,), (1,)),), replicated=frozenset({0}), permuted=frozenset({1}))
    assert len(strategies(rule, (256.0,), TWO)) == 1
    assert len(strategies(replicated_rule(((8, 8),), ((8,),)), (32.0,), TWO)) == 1


def test_what_nobody_reads_is_not_scattered() -> None:
    assert all(r.kind == "all_reduce" for s in strategies(DOT, (1.0,), TWO, (None,)) for r in s.reductions)
    pair = Rule((64, 16), (((0,), (1,)), ((0,), (1,))), (((0,),), ((0,),)), reduction=frozenset({1}))
    found = strategies(pair, (256.0, 256.0), TWO, ((64,), None))
    kinds = {tuple(r.kind for r in s.reductions) for s in found if s.factors == (None, 1)}
    assert kinds == {("all_reduce",), ("all_reduce", "reduce_scatter")}
    both = strategies(pair, (256.0, 256.0), TWO, ((64,), (64,)))
    assert len([s for s in both if s.factors == (None, 1)]) == 4


def programs(seed: int) -> ShardingProblem:
    """A chain with branches of products and elementwise ops on 8 x 8, the last one the next value of an argument."""
    random = np.random.default_rng(seed)
    tensor = Tensor((8, 8), 256)
    values, operations = [tensor] * 2, list[ShardedOp]()
    for _ in range(int(random.integers(1, 5))):
        left, right = (int(random.integers(len(values))) for _ in range(2))
        rule = (DOT8, elementwise((8, 8), 2), WINDOWS8)[int(random.integers(3))]
        seconds, weight = float(random.uniform(0, 4e-6)), float(random.integers(1, 3))
        repack = float(random.choice([0.0, 2e-9])) if rule is DOT8 else 0.0
        operands = (left, right)[: len(rule.operands)]
        operations.append(ShardedOp(operands, (len(values),), rule, seconds, weight, repack_seconds=repack))
        values.append(tensor)
    last = len(values) - 1
    return ShardingProblem(
        tuple(values),
        (0, 1),
        tuple(operations),
        updates=((last, 0),),
        loads=((1, 1e-6),) * (seed % 2),
        received=((1, 2.0),) * (1 - seed % 2),
        live_out=(last,),
    )


DOT8 = Rule((8, 8, 8), (((0,), (1,)), ((1,), (2,))), (((0,), (2,)),), frozenset({1}))
ROWS8 = Halo(operand=0, dim=0, shape=(8, 8), element_bytes=4, advance=8, overlap=2, padding=1)
WINDOWS8 = Rule((8, 8), (((0,), (1,)),), (((0,), (1,)),), halos=(ROWS8,))
LINE = Mesh((Axis("x", 4, 1e-7, 1e-8),))


def test_what_is_received_is_gathered_from_equal_parts() -> None:
    """Twice a step; of 256 bytes each of 4 devices gets 64, which 4 shards need, and gathers what a replicated value needs."""
    values = (Tensor((8, 8), 256), Tensor((8, 8), 256))
    problem = ShardingProblem(values, (0,), (ShardedOp((0,), (1,), elementwise((8, 8), 1)),), received=((0, 2.0),))
    model = ShardingModel(problem, LINE)
    costs = dict(zip(map(str, model.input_specs[0]), model.network.costs[0], strict=True))
    assert costs == {"-,-": pytest.approx(2 * (1e-7 + 3 * 64 * 1e-8)), "x,-": 0.0, "-,x": 0.0}


def everything(model: ShardingModel) -> Iterator[tuple[tuple[int, ...], Shardings]]:
    """All choices."""
    for choice in itertools.product(*(range(len(costs)) for costs in model.network.costs)):
        yield choice, model.shardings(choice)


@pytest.mark.parametrize("seed", range(40))
def test_the_solver_finds_the_least(seed: int) -> None:
    check_least(seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_the_solver_finds_the_least_of_many(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        check_least(seed)


def check_least(seed: int) -> None:
    """The cost added up op by op, of all choices that fit into memory."""
    problem = programs(seed)
    model = ShardingModel(problem, LINE)
    if model.network.num_strategies > 30:
        problem = ShardingProblem(
            problem.values,
            (0, 1),
            problem.ops[:2],
            ((3, 0),),
            loads=problem.loads,
            received=problem.received,
            live_out=(3,),
        )
        model = ShardingModel(problem, LINE)
    costs = dict[tuple[int, ...], float]()
    for choice, shardings in everything(model):
        costs[choice] = step_seconds(model, shardings).total
    sample = next(iter(costs))
    assert model.network.cost(sample) == pytest.approx(costs[sample], rel=1e-9, abs=1e-18)
    peaks = {choice: model.network.peak(choice) for choice in costs}
    least = min(costs.values())
    for memory in (None, int(np.median(list(peaks.values())))):
        limited = ShardingModel(problem, LINE, memory)
        allowed = [cost for choice, cost in costs.items() if memory is None or peaks[choice] <= memory]
        solution = solve(limited.network, 20.0)
        assert solution.optimal
        assert solution.cost == pytest.approx(min(allowed), rel=1e-9, abs=1e-18)
        assert solution.cost >= least * (1 - 1e-9)
        assert step_seconds(limited, limited.shardings(solution.choice)).total == pytest.approx(
            solution.cost, rel=1e-9, abs=1e-18
        )


def test_repacking_is_paid_for_each_device_s_pieces() -> None:
    """A product over rows is cut so that each device reads least: by rows, which both of its operands have."""
    rows = Rule((64, 16, 16), (((0,), (1,)), ((0,), (2,))), (((1,), (2,)),), frozenset({0}))
    tensors = (Tensor((64, 16), 4096), Tensor((64, 16), 4096), Tensor((16, 16), 1024))

    def computing(repack: float) -> dict[tuple[int | None, ...], float]:
        product = ShardedOp((0, 1), (2,), rows, 8e-6, repack_seconds=repack)
        model = ShardingModel(ShardingProblem(tensors, (0, 1), (product,), live_out=(2,)), LINE)
        (found,) = model.strategies
        assert found is not None
        return {s.factors: model.computing(product, s) for s in found}

    assert computing(0.0) == {(None,): 8e-6, (0,): 2e-6, (1,): 2e-6, (2,): 2e-6}
    repacked = computing(1e-9)
    assert repacked[None,] == pytest.approx(8e-6 + 8192e-9)
    assert repacked[0,] == pytest.approx(2e-6 + 2048e-9)
    assert repacked[1,] == repacked[2,] == pytest.approx(2e-6 + (4096 + 1024) * 1e-9)


def test_what_is_given_stays() -> None:
    """An argument, and a value between two ops, in an order of axes that no strategy gives."""
    last_first = Spec(((), ("y", "x")))
    problem = ShardingProblem(
        (Tensor((8, 8), 256),) * 4,
        (0, 1),
        (
            ShardedOp((0, 1), (2,), elementwise((8, 8), 2), 1e-3),
            ShardedOp((2,), (3,), elementwise((8, 8), 1), constraint_specs=(last_first,)),
        ),
        pinned=((0, Spec((("x",), ()))),),
    )
    model = ShardingModel(problem, TWO)
    shardings = model.shardings(solve(model.network).choice)
    assert shardings.arguments[0] == Spec((("x",), ()))
    assert shardings.chosen[1] is not None
    assert shardings.chosen[1].operands == shardings.chosen[1].results == (last_first,)
