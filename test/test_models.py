"""The reference programs: their sizes, what they compute, and that small forms train as a pipeline."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_equal_step

import bactrian
from bactrian.driver.models.alpa_suite import SUITE, model_named
from bactrian.driver.models.experts import expert_parameters, mixture, top_two
from bactrian.driver.models.parameters import draw
from bactrian.driver.models.training_program import TrainingProgram
from bactrian.driver.models.transformer import Transformer
from bactrian.driver.models.wide_resnet import WideResNet

UNITS = {"M": 1e6, "B": 1e9}
TINY = {
    "gpt": Transformer(2, 32, 4, 64, 16),
    "moe": Transformer(2, 32, 4, 64, 16, experts=4, group=32),
    "wresnet": WideResNet(14, 4, 2, 64, 10),
}


def batch_of(program: TrainingProgram, seed: int) -> dict[str, Any]:
    """Random images or tokens, and labels."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(leaf.shape, np.float32)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else random.integers(0, 10, leaf.shape, dtype=np.int32)
        for name, leaf in program.batch.items()
    }


@pytest.mark.parametrize("name", SUITE)
def test_models_have_as_many_parameters_as_their_names_say(name: str) -> None:
    program, said = SUITE[name].training(), name.partition("-")[2]
    count = program.num_parameters
    if "head_bias" not in program.parameters:
        count -= program.parameters["head"].shape[0] * program.parameters["head"].shape[1]  # names count it once
    assert count == pytest.approx(float(said[:-1]) * UNITS[said[-1]], rel=0.05)


def test_full_size_is_shapes_alone() -> None:
    state, batch = SUITE["gpt-76B"].training().shapes()
    leaves = jax.tree.leaves((state, batch))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) > 3 * 76e9
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {1024}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(SUITE["gpt-76B"].training().with_batch(8).batch)} == {8}


@pytest.mark.parametrize("name", TINY)
def test_drawn_state_is_what_shapes_say(name: str) -> None:
    """Weak types too: else the second step would be traced again, and a plan of shapes would fit the second alone."""
    program = TINY[name].training(8)
    drawn = jax.eval_shape(program.state, jax.random.key(0))
    assert drawn == program.shapes()[0]
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(drawn))


def test_a_name_that_there_is_not_gets_the_nearest() -> None:
    for name, fix in (("gpt-39b", "gpt-39B"), ("wide-resnet-13B", "wresnet-13B"), ("moe-2.4", "moe-2.4B")):
        with pytest.raises(bactrian.ConfigError, match=f"there is no model '{name}'") as raised:
            model_named(name)
        assert fix in raised.value.fix and raised.value.fix.startswith("did you mean")
    with pytest.raises(bactrian.ConfigError) as raised:
        model_named("???")
    assert raised.value.fix.startswith("name one of gpt-125M, ")


@pytest.mark.parametrize("name", TINY)
def test_a_small_form_trains_in_two_stages_like_the_reference(name: str) -> None:
    program = TINY[name].training(8)
    step = bactrian.parallelize(program.step, num_stages=2, num_microbatches=2)
    state = jax.tree.map(np.asarray, program.state(jax.random.key(0)))
    for seed in range(2):
        batch = batch_of(program, seed)
        reference, expected = step.reference(state, batch)
        state, loss = step(state, batch)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        # The biases of keys have no gradient: rounding, which Adam makes as large as any other.
        assert_equal_step((bactrian.gather(state)["params"],), (reference["params"],), ("qkv_bias",))


def test_training_lowers_the_loss() -> None:
    program = TINY["moe"].training(8)
    step, state, batch = jax.jit(program.step), program.state(jax.random.key(0)), batch_of(program, 0)
    losses = list[float]()
    for _ in range(20):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_a_gpt_sees_no_later_token() -> None:
    model = TINY["gpt"]
    params = draw(model.parameters(), jax.random.key(0))
    tokens = np.zeros((1, 16), np.int32)
    before = model.logits(params, tokens)
    tokens[0, 8] = 1
    after = model.logits(params, tokens)
    assert np.array_equal(before[0, :8], after[0, :8]) and not np.array_equal(before[0, 8:], after[0, 8:])


def test_dropout_drops_its_share_where_there_is_a_key() -> None:
    model = Transformer(1, 32, 4, 64, 16, dropout=0.25)
    x = jnp.ones((100, 100))
    dropped = model._dropped(x, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.02)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    params, tokens = draw(model.parameters(), jax.random.key(0)), np.zeros((1, 16), np.int32)
    assert not np.array_equal(model.logits(params, tokens), model.logits(params, tokens, jax.random.key(1)))


def slow_top_two(gates: np.ndarray, places: int) -> np.ndarray:
    """Token by token, first choices before second ones."""
    groups, tokens, experts = gates.shape
    found = np.zeros((groups, tokens, experts, places), np.float32)
    for g in range(groups):
        taken = [0] * experts
        order = np.argsort(-gates[g], axis=-1, kind="stable")[:, :2]
        for choice in range(2):
            for s in range(tokens):
                expert = order[s, choice]
                if taken[expert] < places:
                    found[g, s, expert, taken[expert]] = gates[g, s, expert]
                taken[expert] += 1
        total = found[g].sum((1, 2), keepdims=True)
        found[g] /= np.where(total > 0, total, 1)
    return found


def test_tokens_go_to_their_two_best_experts_while_there_are_places() -> None:
    random = np.random.default_rng(0)
    for places in (1, 2, 8, 20):
        gates = random.dirichlet(np.ones(4), (3, 10)).astype(np.float32)
        np.testing.assert_allclose(top_two(gates, places), slow_top_two(gates, places), rtol=1e-5, atol=1e-7)


def test_a_mixture_is_the_weighted_sum_of_experts() -> None:
    params = draw(expert_parameters(2, 8, 16), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    gates = jax.nn.softmax(x @ params["router"])  # two experts with places for all: both work on every token
    each = [jax.nn.relu(x @ params["up"][e]) @ params["down"][e] for e in range(2)]
    expected = sum(gates[..., e, None] * each[e] for e in range(2))
    for group in (6, 12, 100):
        np.testing.assert_allclose(mixture(params, x, group), expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_divide_into_groups_are_refused() -> None:
    params = draw(expert_parameters(2, 8, 16), jax.random.key(0))
    with pytest.raises(bactrian.ConfigError, match="cannot form groups of 8 tokens from 12") as raised:
        mixture(params, jnp.zeros((2, 6, 8)), 8)
    assert raised.value.why == "a microbatch has 2 sequences of 6 tokens"


def test_half_precision_is_in_the_products() -> None:
    model = Transformer(2, 32, 4, 64, 16, tied=True, dtype=jnp.bfloat16)
    text = (
        jax.jit(model.loss)
        .lower(*(jax.eval_shape(lambda: draw(model.parameters(), jax.random.key(0))), model.training(2).batch))
        .as_text()
    )
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("bf16" in line for line in products)
