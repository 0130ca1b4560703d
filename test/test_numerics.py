"""A parallelized step equals one device, for a pairwise cover of models, frameworks, optimizers and plans.

Small models are covered with every number of stages and microbatches, large ones with two of each. With ``--long``, every
combination of all is run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import models
import numerics
import numpy as np
import pytest
from cases import BATCH, WIDTH, Built, Case, batches, chain_loss, matrices, vector_data
from traps import TRAPS

import bactrian
from bactrian.driver.api import Parallelized
from bactrian.driver.traced_step import Traced
from bactrian.passes.schedules.by_name import SCHEDULES

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": tuple(models.MODELS),
    "microbatches": (1, 2, 4, 8),
    "stages": (2, 3, 4, 1),
    "optimizer": tuple(models.OPTIMIZERS),
    "loss": ("mean", "sum"),
    "schedule": tuple(SCHEDULES),
    "result": ("gradients", "state"),
}
SMALL_FACTORS = FACTORS | {"model": models.SMALL_MODELS}
LARGE_FACTORS = FACTORS | {"model": models.LARGE_MODELS_COVER, "microbatches": (2, 4), "stages": (2, 3)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cover, or with ``--long`` the whole product."""
    if "row" in metafunc.fixturenames:
        long = metafunc.config.getoption("--long", default=False)
        rows = whole_product() if long else cover()
        metafunc.parametrize("row", rows, ids=[models.train_case(**row).name for row in rows])


def cover() -> tuple[numerics.Row, ...]:
    """Each pair of values, of small models and of large ones."""
    return numerics.pairwise_cover(SMALL_FACTORS) + numerics.pairwise_cover(LARGE_FACTORS)


def whole_product() -> tuple[numerics.Row, ...]:
    """Every combination, those that differ in the number of stages only one after another."""
    return numerics.product({name: FACTORS[name] for name in sorted(FACTORS, key=lambda name: name == "stages")})


def reference_results(built: Built, step: Parallelized) -> list[Any]:
    """What each step gives on one device."""
    state, results = built.state, list[Any]()
    for batch in built.batches:
        results.append(step.reference(state, *batch))
        state = built.next_state(results[-1])
    return results


def check(built: Built, step: Callable[..., Any], references: list[Any]) -> None:
    """Run all steps, and compare each result with one device, which went on with its own state."""
    state = built.state
    for batch, theirs in zip(built.batches, references, strict=True):
        result = step(state, *batch)
        numerics.assert_equal_step(bactrian.gather(result), theirs, built.zero_gradient_leaves)
        state = built.next_state(result)


@functools.lru_cache(maxsize=1)
def traced_with_references(**row: Any) -> tuple[Built, Traced, list[Any]]:
    """The case of a row without its number of stages, traced once; kept for the next row."""
    jax.clear_caches()
    built = models.train_case(**row).make()
    step = bactrian.parallelize(built.step, **built.options)
    return built, step.trace(built.state, *built.batches[0]), reference_results(built, step)


def test_equals_one_device(row: numerics.Row) -> None:
    built, traced, references = traced_with_references(
        **{name: value for name, value in row.items() if name != "stages"}
    )
    check(built, traced.plan(num_stages=row["stages"]).compile(), references)


@pytest.mark.parametrize("case", TRAPS, ids=lambda case: case.name)
def test_trap(case: Case) -> None:
    built = case.make()
    step = bactrian.parallelize(built.step, **built.options)
    check(built, step, reference_results(built, step))


@pytest.mark.parametrize("stages", [1, 3])
def test_forward_only_equals_one_device(stages: int) -> None:
    params = matrices(*"abcd")
    (batch,) = batches(vector_data, 1)[0]

    def forward(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        return x

    step = bactrian.parallelize(forward, num_stages=stages, num_microbatches=4, forward_only=True)
    ours, theirs = bactrian.gather(step(params, batch)), step.reference(params, batch)
    assert ours.shape == (BATCH, WIDTH)
    numerics.assert_equal_step(ours, theirs)


def test_same_gradients_as_the_whole_batch() -> None:
    """The oracle itself: with a mean loss, microbatches give what one batch gives in plain JAX."""
    built = TRAPS[0].make()
    loss = chain_loss("abcd")
    params = matrices(*"abcd")

    def step(params: Any, batch: Any) -> Any:
        return bactrian.value_and_grad(loss)(params, batch)[::-1]

    reference = bactrian.parallelize(step, num_microbatches=4).reference(params, *built.batches[0])
    plain = jax.jit(jax.value_and_grad(loss))(params, *built.batches[0])
    numerics.assert_equal_step(reference, plain[::-1])


BITWISE = [
    *(
        models.train_case("mlp/plain", "adamw", stages=s, schedule=x)
        for s, x in ((2, "gpipe"), (2, "1f1b"), (4, "1f1b"), (4, "eager-1f1b"))
    ),
    models.train_case("gpt-tied-dropout/linen", "adamw", stages=3),
]


@pytest.mark.parametrize("case", BITWISE, ids=lambda case: case.name)
def test_bits_of_the_same_functions_run_serially(case: Case) -> None:
    """Whatever the schedule and the timing, the bits are those of the stage functions one after another."""
    built = case.make()
    compiled = bactrian.parallelize(built.step, **built.options).trace(built.state, *built.batches[0]).plan().compile()
    program, functions = compiled.session.staged.program, compiled.session.functions
    homes = {call.function: compiled.session.devices[call.stage][0] for call in program.calls}

    def alone(symbol: str) -> Any:
        def call(*inputs: np.ndarray) -> Any:  # on copies, since the function may donate what it gets
            return functions[symbol]([jax.device_put(x, homes[symbol], may_alias=False) for x in inputs])

        return call

    arguments = [np.asarray(x) for x in jax.tree.leaves((built.state, *built.batches[0]))]
    serial = numerics.run_serially(program, {symbol: alone(symbol) for symbol in functions}, arguments)
    ours = jax.tree.leaves(bactrian.gather(compiled(built.state, *built.batches[0])))
    assert len(serial) == len(ours)
    for number, array in serial.items():
        assert np.asarray(ours[number]).tobytes() == array.tobytes()


def test_a_run_gives_the_same_bits_twice() -> None:
    digests = set[str]()
    for _ in range(2):
        built = models.train_case("mlp/plain", "adamw", stages=3).make()
        step = bactrian.parallelize(built.step, **built.options)
        digests.add(numerics.digest(bactrian.gather(step(built.state, *built.batches[0]))))
    assert len(digests) == 1


# The tools of this file


def test_cover_has_each_pair() -> None:
    factors = {"a": range(5), "b": "xyz", "c": (True, False), "d": range(4)}
    rows = numerics.pairwise_cover(factors)
    for (a, xs), (b, ys) in itertools.combinations(factors.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(xs, ys))
    assert rows == numerics.pairwise_cover(factors)
    assert len(rows) <= 30 < len(numerics.product(factors))


def test_cover_keeps_to_what_is_feasible() -> None:
    def feasible(row: numerics.Row) -> bool:
        return not (row.get("where") == 4 and row.get("stages", 4) < 4)

    factors = {"stages": (1, 2, 4), "where": (1, 2, 4), "loss": ("mean", "sum")}
    rows = numerics.pairwise_cover(factors, feasible)
    assert all(feasible(row) for row in rows)
    assert {(row["where"], row["loss"]) for row in rows} == set(itertools.product((1, 2, 4), ("mean", "sum")))


def test_equal_finds_what_differs() -> None:
    tree = {"w": np.ones(100, np.float32), "tiny": np.full(4, 1e-6, np.float32), "n": np.int32(3)}
    loss = np.float32(2.0)
    assert numerics.assert_equal_step((tree, loss), (tree, loss)) == 0.0
    off = tree | {"w": tree["w"] * np.float32(1 + 5e-6)}
    assert 3e-6 < numerics.assert_equal_step((off, loss), (tree, loss)) < 7e-6
    for bad in (
        (tree | {"w": tree["w"] * np.float32(1 + 3e-5)}, loss),
        (tree | {"n": np.int32(4)}, loss),
        (tree | {"w": tree["w"].astype(np.float64)}, loss),
        (tree, np.float32(2.0001)),
        (tree, np.float32(np.nan)),
    ):
        with pytest.raises(AssertionError, match="relative error"):
            numerics.assert_equal_step(bad, (tree, loss))
    noise = tree | {"tiny": -tree["tiny"]}
    with pytest.raises(AssertionError, match="tiny"):
        numerics.assert_equal_step((noise, loss), (tree, loss))
    numerics.assert_equal_step((noise, loss), (tree, loss), ("tiny",))
