"""Layers for another size of microbatch equal those that are traced with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import layered_steps
import pytest
from jaxlib.mlir import ir

import bactrian
from bactrian.passes import pipelines
from bactrian.passes.frame.errors import OtherSizeError
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.group_layers import GroupLayers
from bactrian.passes.pipelining.layer_programs import LayerReading
from bactrian.passes.pipelining.layers import ProgramLayers

MICROBATCHES, LENGTH, WIDTH = 4, 6, 16


def layers_of(module: ir.Module, num_layers: int, sizes: Sequence[int]) -> tuple[ProgramLayers, ...]:
    run_pipeline(module, [GroupLayers(num_layers=num_layers)])
    with module.context, ir.Location.unknown():
        program = LayerReading(module)
        return tuple(program.layers(layered_steps.HOSTS, rows) for rows in sizes or [program.rows])


def traced(step: Callable[..., Any], shapes: Sequence[Any], *sizes: int) -> tuple[ProgramLayers, ...]:
    """The layer of a step."""
    module = bactrian.parallelize(step, num_microbatches=MICROBATCHES).trace(*shapes).captured.module(None)
    run_pipeline(module, pipelines.import_step())
    return layers_of(module, 1, sizes)


def test_other_sizes_are_as_if_traced() -> None:
    smaller, same, larger = layers_of(layered_steps.blocks_step(3, rows=8), 4, [4, 8, 16])
    assert (smaller.rows, same.rows, larger.rows) == (4, 8, 16)
    for made in (smaller, same, larger):
        assert (made,) == layers_of(layered_steps.blocks_step(3, rows=made.rows), 4, [])


Model = Callable[[jax.Array, jax.Array], jax.Array]


def step_of(model: Model, rows: int) -> tuple[Callable[..., Any], list[Any]]:
    """A step of one weight on a batch of rows, a length and a width."""

    def step(weight: jax.Array, x: jax.Array) -> Any:
        value, gradient = bactrian.value_and_grad(lambda w: jnp.square(model(w, x)).mean())(weight)
        return weight - 0.1 * gradient, value

    shapes = (WIDTH, WIDTH), (MICROBATCHES * rows, LENGTH, WIDTH)
    return step, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def attention(w: jax.Array, x: jax.Array) -> jax.Array:
    heads = (x @ w).reshape(*x.shape[:2], 4, -1)
    scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), jnp.einsum("bqhd,bkhd->bhqk", heads, heads), -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads).reshape(x.shape)


def convolution(w: jax.Array, x: jax.Array) -> jax.Array:
    kernel = jnp.stack([w, 2 * w, w])
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize(
    "model",
    [
        attention,
        convolution,
        lambda w, x: jnp.tanh(x.reshape(-1, WIDTH) @ w),  # rows by length
        lambda w, x: jnp.tanh(x.reshape(-1, 2 * LENGTH, WIDTH) @ w).mean(1),  # groups of two rows
        lambda w, x: jnp.tanh(x.transpose(1, 2, 0).reshape(LENGTH, -1).T.reshape(WIDTH, -1, LENGTH)).sum() * w,
        lambda w, x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x),
    ],
    ids=["attention", "convolution", "tokens", "groups", "minor", "loop"],
)
def test_rows_are_followed_through_reshapes(model: Model) -> None:
    assert traced(*step_of(model, 8), 4) == traced(*step_of(model, 4))


@pytest.mark.parametrize(
    ("model", "rows", "why"),
    [
        (lambda w, x: jnp.tanh(x[1:] + x[:-1]) @ w, 4, "an op takes a part of a dim of"),
        (
            lambda w, x: convolution(w, x.transpose(1, 0, 2)),
            4,
            "a dim of 8 that has rows of the batch is read through windows",
        ),
        (lambda w, x: jnp.tanh(x.reshape(2, -1, WIDTH).mean(1)) @ w, 2, "a dim of 2 for 8 rows would be 0"),
    ],
    ids=["slices", "windows", "groups"],
)
def test_what_rows_do_not_fit_is_refused(model: Model, rows: int, why: str) -> None:
    with pytest.raises(OtherSizeError, match=f"cannot tell what layers take with {rows} rows .* with 8\n  why: {why}"):
        traced(*step_of(model, 8), rows)


def test_a_single_row_is_refused() -> None:
    with pytest.raises(OtherSizeError, match="dims of one row look like other dims of one"):
        traced(*step_of(attention, 1), 2)
