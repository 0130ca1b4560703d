"""Programs that are easy to get wrong: what is written agrees with what was chosen, what is predicted with Shardy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sharded
from jaxlib.mlir import ir

from bactrian.passes.frame.errors import PassError, ProgramError
from bactrian.passes.ir.attributes import result_updates
from bactrian.passes.ir.regions import main_function, nested_operations
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.network.solver import solve
from bactrian.passes.sharding.cost_breakdown import phase_seconds
from bactrian.passes.sharding.sharding_model import ShardingModel, step_seconds
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.work_from_ir import Reading

AXES = (("x", 2), ("y", 4))


def solved(body: str, axes: MeshAxes = AXES) -> tuple[ir.Module, Reading, ShardingModel, Writer]:
    """A module with the best shardings written into it; the bytes that were predicted are those that Shardy sends."""
    module = sharded.prepared(f"sdy.mesh @stage0 = <[{sizes(axes)}]>\n{body}", axes)
    reading, model = sharded.read(module, axes)
    solution = solve(model.network, 30.0)
    shardings = model.shardings(solution.choice)
    assert step_seconds(model, shardings).total == pytest.approx(solution.cost, rel=1e-9)
    assert sum(phase_seconds(model, reading, shardings).values()) == pytest.approx(solution.cost, rel=1e-9)
    with module.context, ir.Location.unknown():
        writer = Writer(main_function(module), reading, model, shardings, "stage0")
        write_stages([writer])
        assert module.operation.verify()
        check_shardings(module)
    assert sharded.counted_bytes(module, axes) == pytest.approx(writer.sent)
    return module, reading, model, writer


def sizes(axes: MeshAxes) -> str:
    return ", ".join(f'"{name}"={size}' for name, size in axes)


def check_shardings(module: ir.Module) -> None:
    """The next value of an argument has its sharding; no rule is left anywhere."""
    main = main_function(module)
    before = [ir.DictAttr(entry)["sdy.sharding"] for entry in ir.ArrayAttr(main.attributes["arg_attrs"])]
    after = [ir.DictAttr(entry)["sdy.sharding"] for entry in ir.ArrayAttr(main.attributes["res_attrs"])]
    for result, argument in enumerate(result_updates(main)):
        if argument is not None:
            assert after[result] == before[argument]
    assert not any("sdy.sharding_rule" in op.attributes for op in nested_operations(main))


def given(sharding: str) -> str:
    return f"sdy.sharding = #sdy.sharding<@stage0, {sharding}>"


ROWS, COLUMNS, WHOLE = given('[{"x"}, {}]'), given('[{}, {"y"}]'), given("[{}, {}]")
ONE_VALUE_UPDATES_TWO = f"""
func.func public @main(%a: tensor<8x8xf32> {{{ROWS}}}, %b: tensor<8x8xf32> {{{COLUMNS}}})
    -> (tensor<8x8xf32> {{bactrian.updates = 0 : i64}}, tensor<8x8xf32> {{bactrian.updates = 1 : i64}}) {{
  %c = stablehlo.add %a, %b : tensor<8x8xf32>
  return %c, %c : tensor<8x8xf32>, tensor<8x8xf32>
}}"""
ARGUMENTS_CHANGE_PLACES = f"""
func.func public @main(%a: tensor<8x8xf32> {{{ROWS}}}, %b: tensor<8x8xf32> {{{COLUMNS}}})
    -> (tensor<8x8xf32> {{bactrian.updates = 0 : i64}}, tensor<8x8xf32> {{bactrian.updates = 1 : i64}}) {{
  return %b, %b : tensor<8x8xf32>, tensor<8x8xf32>
}}"""
CONSTRAINED_CONSTANT = """
func.func public @main(%a: tensor<8x8xf32>) -> tensor<8x8xf32> {
  %c = stablehlo.constant dense<1.0> : tensor<8x8xf32>
  %k = sdy.sharding_constraint %c <@stage0, [{}, {"y"}]> : tensor<8x8xf32>
  %r = stablehlo.add %a, %k : tensor<8x8xf32>
  return %r : tensor<8x8xf32>
}"""
FREE_UPDATE = f"""
func.func public @main(%a: tensor<8x16xf32> {{{ROWS}}}, %b: tensor<8x16xf32> {{{WHOLE}}})
    -> (tensor<8x16xf32> {{bactrian.updates = 0 : i64}}, tensor<8x16xf32> {{bactrian.updates = 1 : i64}}) {{
  %c = stablehlo.constant dense<1.0> : tensor<f32>
  %w = stablehlo.broadcast_in_dim %c, dims = [] : (tensor<f32>) -> tensor<8x16xf32>
  %r = stablehlo.add %a, %w : tensor<8x16xf32>
  return %r, %w : tensor<8x16xf32>, tensor<8x16xf32>
}}"""
GRADIENT_BOUNDARY = f"""
func.func public @main(%x: tensor<4096x64xf32> {{{ROWS}}}, %w: tensor<64x64xf32>)
    -> (tensor<64x64xf32> {{bactrian.updates = 1 : i64}}) {{
  %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
  %g = stablehlo.dot_general %x, %y, contracting_dims = [0] x [0] : (tensor<4096x64xf32>, tensor<4096x64xf32>) -> tensor<64x64xf32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {{mhlo.backend_config = {{kinds = "gradient", reductions = "accumulated"}}}} : (tensor<64x64xf32>) -> tensor<64x64xf32>
  %n = stablehlo.subtract %w, %b : tensor<64x64xf32>
  return %n : tensor<64x64xf32>
}}"""
CAPTURED = """
func.func public @main(%x: tensor<8x8xf32>, %w: tensor<8x8xf32>) -> tensor<8x8xf32> {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %one = stablehlo.constant dense<1> : tensor<i32>
  %three = stablehlo.constant dense<3> : tensor<i32>
  %r:2 = stablehlo.while(%i = %zero, %z = %x) : tensor<i32>, tensor<8x8xf32>
   cond {
    %c = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %c : tensor<i1>
  } do {
    %a = stablehlo.add %z, %w : tensor<8x8xf32>
    %b = stablehlo.multiply %a, %w : tensor<8x8xf32>
    %d = stablehlo.add %b, %x : tensor<8x8xf32>
    %j = stablehlo.add %i, %one : tensor<i32>
    stablehlo.return %j, %d : tensor<i32>, tensor<8x8xf32>
  }
  return %r#1 : tensor<8x8xf32>
}"""
BARRIER = """
func.func public @main(%x: tensor<65536x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32>) -> tensor<65536x64xf32> {
  %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<65536x64xf32>, tensor<64x64xf32>) -> tensor<65536x64xf32>
  %b:2 = stablehlo.optimization_barrier %y, %w : tensor<65536x64xf32>, tensor<64x64xf32>
  %z = stablehlo.dot_general %b#0, %b#1, contracting_dims = [1] x [0] : (tensor<65536x64xf32>, tensor<64x64xf32>) -> tensor<65536x64xf32>
  return %z : tensor<65536x64xf32>
}"""
NOTHING = "func.func public @main(%x: tensor<8xf32>) -> tensor<8xf32> {\n  return %x : tensor<8xf32>\n}"


@pytest.mark.parametrize(
    "text",
    [
        ONE_VALUE_UPDATES_TWO,
        ARGUMENTS_CHANGE_PLACES,
        CONSTRAINED_CONSTANT,
        FREE_UPDATE,
        GRADIENT_BOUNDARY,
        CAPTURED,
        BARRIER,
        NOTHING,
    ],
    ids=[
        "one-updates-two",
        "swap",
        "constrained-constant",
        "free-update",
        "boundary",
        "captured",
        "barrier",
        "nothing",
    ],
)
def test_what_is_written_is_what_was_chosen(text: str) -> None:
    module, _, _, _ = solved(text)
    rng = np.random.default_rng(0)
    with module.context:
        type_ = ir.FunctionType(ir.TypeAttr(main_function(module).attributes["function_type"]).value)
        shapes = [tuple(ir.RankedTensorType(t).shape) for t in type_.inputs]
    arguments: list[Any] = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    got = sharded.run(module, AXES, arguments)
    for one, other in zip(got, alone(text, arguments), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(other).max()))


def alone(text: str, arguments: list[Any]) -> list[np.ndarray[Any, Any]]:
    """The results on one device, where nothing is given."""
    for attribute in (ROWS, COLUMNS, WHOLE):
        text = text.replace(attribute, 'jax.arg_info = "a"')
    axes = (("x", 1),)
    text = text.replace('<@stage0, [{}, {"y"}]>', "<@stage0, [{}, {}]>")
    module = sharded.prepared(f"sdy.mesh @stage0 = <[{sizes(axes)}]>\n{text}", axes)
    reading, model = sharded.read(module, axes)
    sharded.write(module, reading, model, [0] * len(model.network.costs))
    return sharded.run(module, axes, arguments)


def test_a_captured_value_is_moved_once_before_the_loop() -> None:
    other = given('[{}, {"x"}]')
    text = CAPTURED.replace("%x: tensor<8x8xf32>", f"%x: tensor<8x8xf32> {{{ROWS}}}")
    module, reading, _, writer = solved(text.replace("%w: tensor<8x8xf32>", f"%w: tensor<8x8xf32> {{{other}}}"))
    readers = [op for op in reading.problem.ops if 1 in op.operands]
    assert [(op.runs_per_step, op.reshards_of(op.operands.index(1))) for op in readers] == [(3.0, 1.0)] * 2
    assert writer.sent
    (loop,) = [op for op in nested_operations(main_function(module)) if op.name == "stablehlo.while"]
    assert "sdy.reshard" not in [op.name for op in nested_operations(loop)]


def test_a_barrier_cuts_no_plan() -> None:
    module, _, _, writer = solved(BARRIER)
    assert writer.sent == {}
    assert '{"x", "y"}' in str(module)


def test_an_axis_of_one_device_cuts_nothing() -> None:
    attribute = given('[{"o"}, {"x"}]')
    text = f"""
func.func public @main(%a: tensor<8x6xf32> {{{attribute}}}) -> tensor<8x6xf32> {{
  %k = sdy.sharding_constraint %a <@stage0, [{{"o"}}, {{}}]> : tensor<8x6xf32>
  %r = stablehlo.sine %k : tensor<8x6xf32>
  return %r : tensor<8x6xf32>
}}"""
    _, _, model, _ = solved(text, (("x", 2), ("o", 1)))
    assert [str(spec) for spec in model.input_specs[0]] == ["-,x"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            NOTHING.replace("%x: tensor<8xf32>", "%x: tensor<8xf32> {" + given("[{?}]") + "}"),
            PassError,
            "leaves a dim open",
        ),
        (
            NOTHING.replace("8xf32", "6xf32").replace(
                "%x: tensor<6xf32>", "%x: tensor<6xf32> {" + given('[{"y"}]') + "}"
            ),
            ProgramError,
            "dim 0 of size 6",
        ),
        (
            NOTHING.replace("-> tensor<8xf32>", "-> (tensor<8xf32> {" + given("[{}]") + "})"),
            PassError,
            "result 0 of @main",
        ),
    ],
    ids=["open", "uneven", "result"],
)
def test_what_is_not_there_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solved(text)
