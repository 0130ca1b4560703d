"""Rematerialization by layer: the numbers are those of one device, and what is kept is what the words say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_equal_step

import bactrian
from bactrian.driver.report.plan_table import remat_text
from bactrian.driver.xla.compile_stage import compile_function, function_texts
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.peak.estimate import module_memory
from bactrian.passes.plan.schema import Plan

WIDTH, ROWS, LAYERS, MICROBATCHES = 32, 16, 4, 4
HEADS, LENGTH = 2, 8

Loss = Callable[[Any, Any], jax.Array]


def matrices(count: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {f"w{i}": random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5 for i in range(count)}


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.standard_normal((ROWS, LENGTH, WIDTH), dtype=np.float32) for name in ("x", "y")}


def mlp_layer(w: Any, x: jax.Array) -> jax.Array:
    for _ in range(3):
        x = jnp.tanh(x @ w) + x
    return x


def mlp_loss(layer: Callable[[Any, jax.Array], jax.Array] = mlp_layer, cut: bool = False) -> Loss:
    """The loss of a chain of layers; ``cut`` says that each is a layer of the plan."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for i in range(LAYERS):
            x = layer(params[f"w{i}"], bactrian.stage_boundary(x) if cut and i else x)
        return jnp.mean((x - batch["y"]) ** 2)

    return loss


def attention(w: Any, x: jax.Array) -> jax.Array:
    """A block of attention and an MLP, with norms, all with one matrix."""
    scale = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3)
    heads = (x / scale @ w).reshape(*x.shape[:2], HEADS, WIDTH // HEADS)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads, jnp.roll(heads, 1, axis=-1)) / (WIDTH // HEADS) ** 0.5
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, heads).reshape(x.shape) @ w.T
    return x + jax.nn.gelu(x @ w) @ w.T


def dropout_loss(params: Any, batch: Any) -> jax.Array:
    """Other bits for every microbatch, drawn again with the layer."""
    key, x = jax.random.fold_in(jax.random.key(3), bactrian.microbatch_index()), batch["x"]
    for i in range(LAYERS):
        h = jnp.tanh(x @ params[f"w{i}"])
        x = x + jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, h.shape), h, 0.0) @ params[f"w{i}"]
    return jnp.mean((x - batch["y"]) ** 2)


LOSSES: Mapping[str, Loss] = {
    "mlp": mlp_loss(),
    "attention": mlp_loss(attention),
    "dropout": dropout_loss,
    "checkpoint": mlp_loss(jax.checkpoint(attention)),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_stages": 1, "remat": ["all"] * LAYERS},
    {"num_stages": 1, "num_microbatches": 1, "remat": ["products"] * LAYERS},
    {"num_stages": 2, "schedule": "gpipe", "remat": ["all", "products", "none", "all"]},
    {"num_stages": 3, "remat": ["all", "all", "products", "all"]},
    {"num_stages": 2, "mesh": "data=2", "remat": ["products", "all", "all", "all"]},
)


def made(loss: Loss, **options: Any) -> Any:
    """A step of plain gradient descent."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    given: dict[str, Any] = {"num_microbatches": MICROBATCHES, **options}
    return bactrian.parallelize(step, **given)


SHORT = ("attention-1", "dropout-1-1", "checkpoint-2-gpipe", "dropout-3", "mlp-2-data=2")


def cases() -> Iterator[Any]:
    """Every loss with all options; few in the short form."""
    for name, options in itertools.product(LOSSES, OPTIONS):
        words = "-".join([name, *map(str, list(options.values())[:-1])])
        yield pytest.param(name, options, id=words, marks=() if words in SHORT else pytest.mark.long)


@pytest.mark.parametrize(("name", "options"), [*cases()])
def test_numbers_are_those_of_one_device(name: str, options: dict[str, Any]) -> None:
    step = made(LOSSES[name], **options)
    reference = step.reference(matrices(LAYERS), batch())
    assert_equal_step(bactrian.gather(step(matrices(LAYERS), batch())), reference)


def planned(loss: Loss, **options: Any) -> Any:
    return made(loss, **options).trace(matrices(LAYERS), batch()).plan()


def test_a_layer_keeps_what_comes_into_it() -> None:
    value = ROWS // MICROBATCHES * LENGTH * WIDTH * 4
    kept = {
        word: planned(mlp_loss(cut=True), num_stages=1, schedule="gpipe", remat=[word] * LAYERS)
        .plan.stages[0]
        .activation_bytes
        for word in ("products", "all")
    }
    assert kept["all"] == (LAYERS - 1) * value  # the first one reads the batch
    assert kept["products"] == (LAYERS - 1 + 3 * LAYERS) * value


def temporaries(planned_step: Any, function: str) -> tuple[int, int]:
    """Bytes that a function needs beside arguments and results: XLA's, and those that are predicted."""
    module = planned_step.staged.module
    found = compile_function(function_texts(module)[function], jax.devices()[:1]).get_compiled_memory_stats()
    return found.temp_size_in_bytes, module_memory(module)[function].temporaries


@pytest.mark.parametrize("loss", ["mlp", pytest.param("attention", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("options", "function"),
    [({}, "stage0.forward_backward"), ({"schedule": "gpipe"}, "stage0.backward")],
    ids=["fused", "backward"],
)
def test_memory_falls_as_predicted(loss: str, options: dict[str, Any], function: str) -> None:
    known = {}
    for word in ("none", "products", "all"):
        xla, predicted = temporaries(planned(LOSSES[loss], num_stages=1, remat=[word] * LAYERS, **options), function)
        assert 0.94 * xla <= predicted <= 1.2 * xla
        known[word] = xla
    if not options:  # nothing is kept outside of the function
        assert known["all"] < 0.6 * known["none"] and known["all"] < known["products"] < known["none"]


def test_checkpoint_saves_memory() -> None:
    plain, _ = temporaries(planned(mlp_loss(mlp_layer), num_stages=1), "stage0.forward_backward")
    saving = planned(mlp_loss(jax.checkpoint(mlp_layer)), num_stages=1)
    xla, predicted = temporaries(saving, "stage0.forward_backward")
    assert xla < 0.6 * plain and 0.94 * xla <= predicted <= 1.1 * xla


def test_a_backward_function_computes_one_layer_after_the_other() -> None:
    one = planned(LOSSES["mlp"], num_stages=1, schedule="gpipe", remat=["all"] * LAYERS)
    whole = planned(LOSSES["mlp"], num_stages=1, schedule="gpipe", remat="all")  # one layer
    assert temporaries(one, "stage0.backward")[0] < 0.5 * temporaries(whole, "stage0.backward")[0]


def test_a_plan_says_it_and_applies_it() -> None:
    plan = planned(LOSSES["mlp"], num_stages=2, remat=["all", "none", "all", "none"]).plan
    assert plan.remat == ("all", "none", "all", "none") and plan.num_layers == LAYERS
    assert Plan.from_json(plan.to_json()) == plan
    again = planned(LOSSES["mlp"], plan=plan).plan
    assert again == plan
    assert planned(LOSSES["mlp"], num_stages=2, remat="none").plan.remat == ()


def test_the_table_says_it() -> None:
    plan = planned(LOSSES["mlp"], num_stages=2, remat=["all", "all", "none", "products"]).plan
    assert "remat all 0–1, none 2, products 3" in str(plan)
    assert remat_text(("all",) * 3) == "remat all"


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("some", "unknown word 'some' for remat"),
        ("al", "did you mean all?"),
        (["all", "everything"], "unknown word 'everything' for remat"),
        (3, "remat is 3"),
        ([], r"remat is \[\]"),
    ],
)
def test_other_words_are_refused(remat: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(LOSSES["mlp"], remat=remat)


def test_words_are_as_many_as_layers() -> None:
    step = made(LOSSES["mlp"], num_stages=2, remat=["all", "none", "all"])
    with pytest.raises(ConfigError, match="remat has 3 words, the program has 4 layers"):
        step.trace(matrices(LAYERS), batch()).plan(num_layers=4)
    plan = planned(LOSSES["mlp"], num_stages=2).plan
    with pytest.raises(ConfigError, match="remat is all, but the plan has none"):
        made(LOSSES["mlp"], plan=plan, remat="all")
