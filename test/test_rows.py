"""An argument of which each stage holds some rows: a hand-written staged module, placed, run and gathered."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

import bactrian
from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.planned_step import Planned
from bactrian.driver.planning.extract import extract
from bactrian.driver.run.compiled_step import Compiled
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import PassError
from bactrian.runtime.staged_program import ArgumentPiece, ResultPiece

W = np.arange(12, dtype=np.float32).reshape(4, 3)
X = np.array([[1, 2, 3], [0, 1, -1]], np.float32)

# The loss is sum((x @ w.T)^2) / 2. Each stage adds its two rows of w, and updates them.
STAGED = """
module @rows attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 2 : i64, bactrian.order = [["F0"], ["F0"]], bactrian.schedule = "gpipe"} {
  sdy.mesh @stage0 = <["data"=1]>
  sdy.mesh @stage1 = <["data"=1]>
  func.func public @main(%w0: !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>> {bactrian.argument = 0 : i64, bactrian.role = "state", bactrian.rows = [0, 2]}, %w1: !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>> {bactrian.argument = 0 : i64, bactrian.role = "state", bactrian.rows = [2, 4]}, %x0: !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>> {bactrian.argument = 1 : i64, bactrian.role = "batch"}, %x1: !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>> {bactrian.argument = 1 : i64, bactrian.role = "batch"}) -> (!mpmd.mesh_tensor<"stage0", tensor<2x3xf32>> {bactrian.result = 0 : i64, bactrian.rows = [0, 2], bactrian.updates = 0 : i64}, !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>> {bactrian.result = 0 : i64, bactrian.rows = [2, 4], bactrian.updates = 0 : i64}, !mpmd.mesh_tensor<"stage1", tensor<f32>> {bactrian.result = 1 : i64}) attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
    %f:2 = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @stage0.forward(%w0, %x0) {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>) -> (!mpmd.mesh_tensor<"stage0", tensor<f32>>, !mpmd.mesh_tensor<"stage0", tensor<2x2xf32>>)
    %t = mpmd.transfer %f#0 : (!mpmd.mesh_tensor<"stage0", tensor<f32>>) -> !mpmd.mesh_tensor<"stage1", tensor<f32>>
    %g:2 = mpmd.fragment_call<mesh="stage1", origin=["forward"]> @stage1.forward(%w1, %x1, %t) {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (!mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<f32>>) -> (!mpmd.mesh_tensor<"stage1", tensor<f32>>, !mpmd.mesh_tensor<"stage1", tensor<2x2xf32>>)
    %u = mpmd.fragment_call<mesh="stage0", origin=["update"]> @stage0.update(%w0, %x0, %f#1) {bactrian.phase = "update", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage0", tensor<2x2xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>
    %v = mpmd.fragment_call<mesh="stage1", origin=["update"]> @stage1.update(%w1, %x1, %g#1) {bactrian.phase = "update", bactrian.stage = 1 : i64} : (!mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<2x2xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>
    return %u, %v, %g#0 : !mpmd.mesh_tensor<"stage0", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<2x3xf32>>, !mpmd.mesh_tensor<"stage1", tensor<f32>>
  }
  func.func private @stage0.forward(%w: tensor<2x3xf32>, %x: tensor<2x3xf32>) -> (tensor<f32>, tensor<2x2xf32>) attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %half = stablehlo.constant dense<0.5> : tensor<f32>
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [1] : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x2xf32>
    %square = stablehlo.multiply %y, %y : tensor<2x2xf32>
    %sum = stablehlo.reduce(%square init: %zero) applies stablehlo.add across dimensions = [0, 1] : (tensor<2x2xf32>, tensor<f32>) -> tensor<f32>
    %loss = stablehlo.multiply %sum, %half : tensor<f32>
    return %loss, %y : tensor<f32>, tensor<2x2xf32>
  }
  func.func private @stage1.forward(%w: tensor<2x3xf32>, %x: tensor<2x3xf32>, %before: tensor<f32>) -> (tensor<f32>, tensor<2x2xf32>) attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %half = stablehlo.constant dense<0.5> : tensor<f32>
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [1] : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x2xf32>
    %square = stablehlo.multiply %y, %y : tensor<2x2xf32>
    %sum = stablehlo.reduce(%square init: %zero) applies stablehlo.add across dimensions = [0, 1] : (tensor<2x2xf32>, tensor<f32>) -> tensor<f32>
    %own = stablehlo.multiply %sum, %half : tensor<f32>
    %loss = stablehlo.add %before, %own : tensor<f32>
    return %loss, %y : tensor<f32>, tensor<2x2xf32>
  }
  func.func private @stage0.update(%w: tensor<2x3xf32> {tf.aliasing_output = 0 : i32}, %x: tensor<2x3xf32>, %y: tensor<2x2xf32>) -> tensor<2x3xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    %rate = stablehlo.constant dense<0.5> : tensor<2x3xf32>
    %gradient = stablehlo.dot_general %y, %x, contracting_dims = [0] x [0] : (tensor<2x2xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    %step = stablehlo.multiply %gradient, %rate : tensor<2x3xf32>
    %new = stablehlo.subtract %w, %step : tensor<2x3xf32>
    return %new : tensor<2x3xf32>
  }
  func.func private @stage1.update(%w: tensor<2x3xf32> {tf.aliasing_output = 0 : i32}, %x: tensor<2x3xf32>, %y: tensor<2x2xf32>) -> tensor<2x3xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    %rate = stablehlo.constant dense<0.5> : tensor<2x3xf32>
    %gradient = stablehlo.dot_general %y, %x, contracting_dims = [0] x [0] : (tensor<2x2xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    %step = stablehlo.multiply %gradient, %rate : tensor<2x3xf32>
    %new = stablehlo.subtract %w, %step : tensor<2x3xf32>
    return %new : tensor<2x3xf32>
  }
}
"""


@bactrian.parallelize(num_stages=2, num_microbatches=1)
def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum((x @ w[:2].T) ** 2) / 2 + jnp.sum((x @ w[2:].T) ** 2) / 2

    value, gradient = bactrian.value_and_grad(loss)(w)
    return w - 0.5 * gradient, value


def parsed(text: str) -> ir.Module:
    with make_context():
        return ir.Module.parse(text)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    planned = step.trace(W, X).plan()
    return Planned(planned.captured, dataclasses.replace(planned.staged, module=parsed(STAGED))).compile()


def reference(w: np.ndarray) -> tuple[np.ndarray, float]:
    """All values are whole numbers and halves, so that sums in any order are equal."""
    y = X @ w.T
    return w - 0.5 * (y.T @ X), float(np.sum(y**2) / 2)


def test_the_pieces_carry_their_rows() -> None:
    program = extract(parsed(STAGED))
    assert program.arguments[:2] == (ArgumentPiece(0, "state", 0, (0, 2)), ArgumentPiece(0, "state", 1, (2, 4)))
    assert [(piece.result, piece.rows) for piece in program.results] == [(0, (0, 2)), (0, (2, 4)), (1, None)]
    assert isinstance(program.results[0], ResultPiece)


def test_a_step_on_rows_equals_the_whole(compiled: Compiled) -> None:
    expected, value = reference(W)
    state, found = compiled(W, X)
    assert float(found) == value
    assert {stage: state.pieces[stage].shape for stage in (0, 1)} == {0: (2, 3), 1: (2, 3)}
    np.testing.assert_array_equal(bactrian.gather(state), expected)
    again, found = compiled(state, X)
    assert float(found) == reference(expected)[1]
    np.testing.assert_array_equal(bactrian.gather(again), reference(expected)[0])


def test_put_places_the_rows_and_gather_brings_them_back(compiled: Compiled) -> None:
    there = bactrian.put(W, compiled, argnum=0)
    assert isinstance(there, DistributedArray)
    assert there.shape == (4, 3)
    np.testing.assert_array_equal(there.piece(0), W[:2])
    np.testing.assert_array_equal(there.piece(1), W[2:])
    assert "rows 0 to 2 on one device; rows 2 to 4 on one device" in repr(there)
    with pytest.raises(AttributeError, match="different rows"):
        _ = there.sharding
    np.testing.assert_array_equal(bactrian.gather(there), W)
    state, _ = compiled(there, X)
    np.testing.assert_array_equal(bactrian.gather(state), reference(W)[0])


def test_an_array_of_other_pieces_is_dealt_out_again(compiled: Compiled) -> None:
    place = compiled.placements[0]
    whole = dataclasses.replace(place, rows={})
    pieces = {stage: jax.device_put(W, sharding) for stage, sharding in place.shardings.items()}
    state, _ = compiled(DistributedArray(whole, pieces), X)
    np.testing.assert_array_equal(bactrian.gather(state), reference(W)[0])
    state, _ = compiled(jnp.asarray(W), X)  # an array on a device, not on the host
    np.testing.assert_array_equal(bactrian.gather(state), reference(W)[0])


def placement(rows: dict[int, tuple[int, int]], stages: tuple[int, ...] = (0, 1, 2)) -> ArgumentPlacement:
    return ArgumentPlacement(0, 0, "w", (4, 3), np.dtype("float32"), stages, rows=rows)


def test_the_stages_that_a_whole_array_is_read_from() -> None:
    assert placement({}).sources == (0,)
    assert placement({0: (0, 2), 1: (2, 4)}).sources == (2,)
    assert placement({0: (2, 4), 1: (0, 1), 2: (0, 3)}).sources == (1, 2, 0)
    assert placement({0: (2, 4), 1: (0, 2), 2: (0, 2)}).sources == (1, 0)
    with pytest.raises(PassError, match="row 1 of w is on no stage"):
        _ = placement({0: (2, 4), 1: (0, 1)}, (0, 1)).sources


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "bactrian.rows = [2, 4]}, %x0",
            "bactrian.rows = [2, 5]}, %x0",
            r"argument 0 on stage 1 is rows \[2, 5\), but",
        ),
        ("bactrian.rows = [2, 4], bact", "bactrian.rows = [4, 2], bact", r"result 0 on stage 1 is rows \[4, 2\), but"),
        (
            'role = "batch"}, %x1',
            'role = "batch", bactrian.rows = [0, 2]}, %x1',
            "argument 1 on stage 0 is some rows of a",
        ),
        (
            "bactrian.rows = [2, 4], bactrian.updates = 0 : i64",
            "bactrian.rows = [2, 4]",
            "only what stays on its stages",
        ),
        (
            '1 : i64, bactrian.role = "batch"}, %x1',
            '0 : i64, bactrian.role = "state"}, %x1',
            "stage 0 has two pieces of",
        ),
    ],
)
def test_pieces_that_make_no_sense_are_refused(before: str, after: str, message: str) -> None:
    text = STAGED.replace(before, after)
    assert text != STAGED
    with pytest.raises(PassError, match=message):
        extract(parsed(text))
