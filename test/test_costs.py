"""Costs of ops, against numbers worked out by hand."""

from __future__ import annotations

import time

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame.context import make_context
from bactrian.passes.ir import op_traits
from bactrian.passes.ir.op_costs import CostModel, repacks, trip_count
from bactrian.passes.machine.device import CPU_CORE, Device, OpCost
from bactrian.passes.stages.op_times import OpTimes

FUNCTION = """
func.func @main(%x: tensor<8x16xf32>, %w: tensor<16x4xf32>, %i: tensor<2x1xi32>, %b: tensor<8x16xbf16>,
    %image: tensor<2x8x8x3xf32>, %kernel: tensor<3x3x3x5xf32>, %p: tensor<i1>, %z: tensor<4xcomplex<f32>>) {
  %zero = stablehlo.constant dense<0.0> : tensor<f32>
  BODY
  return
}
"""

CASES = {
    "dot": (
        "%r = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0]"
        " : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x4xf32>",
        2 * 8 * 4 * 16,
        4 * (8 * 16 + 16 * 4 + 8 * 4),
    ),
    "convolution": (
        "%r = stablehlo.convolution(%image, %kernel) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f],"
        " window = {pad = [[1, 1], [1, 1]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64}"
        " : (tensor<2x8x8x3xf32>, tensor<3x3x3x5xf32>) -> tensor<2x8x8x5xf32>",
        2 * (2 * 8 * 8 * 5) * (3 * 3 * 3),
        4 * (2 * 8 * 8 * 3 + 3 * 3 * 3 * 5 + 2 * 8 * 8 * 5),
    ),
    "elementwise": ("%r = stablehlo.add %x, %x : tensor<8x16xf32>", 128, 3 * 512),
    "half": ("%r = stablehlo.add %b, %b : tensor<8x16xbf16>", 128, 3 * 256),
    "complex": ("%r = stablehlo.add %z, %z : tensor<4xcomplex<f32>>", 4, 3 * 32),
    "transcendental": ("%r = stablehlo.tanh %x : tensor<8x16xf32>", 8 * 128, 2 * 512),
    "reduce": (
        "%r = stablehlo.reduce(%x init: %zero) applies stablehlo.add across dimensions = [1]"
        " : (tensor<8x16xf32>, tensor<f32>) -> tensor<8xf32>",
        128,
        512 + 4 + 32,
    ),
    "gather": (
        '%r = "stablehlo.gather"(%w, %i) {dimension_numbers = #stablehlo.gather<offset_dims = [1],'
        " collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 4>}"
        " : (tensor<16x4xf32>, tensor<2x1xi32>) -> tensor<2x4xf32>",
        0,
        2 * 32 + 8,
    ),
    "reshape": ("%r = stablehlo.reshape %x : (tensor<8x16xf32>) -> tensor<128xf32>", 0, 0),
    "case": (
        '%r = "stablehlo.if"(%p) ({ stablehlo.return %x : tensor<8x16xf32> },'
        " { %t = stablehlo.tanh %x : tensor<8x16xf32> stablehlo.return %t : tensor<8x16xf32> })"
        " : (tensor<i1>) -> tensor<8x16xf32>",
        8 * 128,
        2 * 512,
    ),
    "marker": (
        "%r = stablehlo.custom_call @bactrian.stage_boundary(%x) : (tensor<8x16xf32>) -> tensor<8x16xf32>",
        0,
        0,
    ),
}

LOOP = """
  %start = stablehlo.constant dense<1> : tensor<i32>
  %r:2 = stablehlo.while(%n = %start, %a = %x) : tensor<i32>, tensor<8x16xf32>
  cond {
    %limit = stablehlo.constant dense<LIMIT> : tensor<i32>
    %c = stablehlo.compare LT, %n, %limit : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %c : tensor<i1>
  } do {
    %step = stablehlo.constant dense<2> : tensor<i32>
    %m = stablehlo.add %n, %step : tensor<i32>
    %t = stablehlo.add %a, %a : tensor<8x16xf32>
    stablehlo.return %m, %t : tensor<i32>, tensor<8x16xf32>
  }
"""


@pytest.fixture
def parse():
    """Gives the last op of a body; its module lives as long as the test."""
    modules = []

    def last_op(body):
        modules.append(ir.Module.parse(FUNCTION.replace("BODY", body), make_context()))
        *_, op, _end = modules[-1].body.operations[0].regions[0].blocks[0].operations
        return op.operation

    return last_op


@pytest.mark.parametrize("case", CASES)
def test_flops_and_bytes(parse, case):
    body, flops, size = CASES[case]
    cost = CostModel().cost(parse(body))
    assert (cost.flops, cost.bytes) == (flops, size)


@pytest.mark.parametrize(("limit", "count"), [(7, 3), (8, 4), (1, 0)])
def test_a_counted_loop_costs_its_trips(parse, limit, count):
    op = parse(LOOP.replace("LIMIT", str(limit)))
    assert trip_count(op) == count
    once = 1 + 1 + 8 * 16  # compare, counter, body
    assert CostModel().flops(op) == (once * count if count else once)


def test_a_loop_of_unknown_length_costs_what_the_model_says(parse):
    op = parse(LOOP.replace("dense<LIMIT>", "dense<9>").replace("compare LT", "compare NE"))
    assert trip_count(op) is None
    assert CostModel(unknown_trip_count=10).flops(op) == 10 * (1 + 1 + 8 * 16)


PRODUCTS = {
    "%x, %w, contracting_dims = [1] x [0] : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x4xf32>": False,
    "%x, %x, contracting_dims = [1] x [1] : (tensor<8x16xf32>, tensor<8x16xf32>) -> tensor<8x8xf32>": False,
    "%x, %x, contracting_dims = [0] x [0] : (tensor<8x16xf32>, tensor<8x16xf32>) -> tensor<16x16xf32>": True,
    "%x, %w, contracting_dims = [] x [] : (tensor<8x16xf32>, tensor<16x4xf32>) -> tensor<8x16x16x4xf32>": False,
    "%x, %x, contracting_dims = [0, 1] x [0, 1] : (tensor<8x16xf32>, tensor<8x16xf32>) -> tensor<f32>": False,
    "%image, %image, contracting_dims = [0, 1, 2] x [0, 1, 2]"
    " : (tensor<2x8x8x3xf32>, tensor<2x8x8x3xf32>) -> tensor<3x3xf32>": True,
    "%x, %x, batching_dims = [0] x [0], contracting_dims = [1] x [1]"
    " : (tensor<8x16xf32>, tensor<8x16xf32>) -> tensor<8xf32>": False,
}


@pytest.mark.parametrize(("product", "expected"), PRODUCTS.items())
def test_products_over_rows_repack_their_operands(parse, product, expected):
    assert repacks(parse(f"%r = stablehlo.dot_general {product}")) is expected


def test_other_ops_repack_nothing(parse):
    assert not repacks(parse(CASES["convolution"][0])) and not repacks(parse(CASES["elementwise"][0]))


def test_a_device_takes_the_larger_of_compute_and_memory_time():
    device = Device("d", {"default": 1e9, "bf16": 4e9}, 1e8)
    assert device.seconds(OpCost(2e9, 1e6, "f32")) == 2.0
    assert device.seconds(OpCost(2e9, 1e6, "bf16")) == 0.5
    assert device.seconds(OpCost(1e3, 1e8, "f32")) == 1.0
    assert CPU_CORE.seconds(OpCost(5e10, 0.0, "f32")) == 1.0


def test_twenty_thousand_ops_are_fast():
    lines = ["%a0 = stablehlo.add %x, %x : tensor<8x16xf32>"]
    lines += [f"%a{n} = stablehlo.add %a{n - 1}, %x : tensor<8x16xf32>" for n in range(1, 20_000)]
    module = ir.Module.parse(FUNCTION.replace("BODY", "\n".join(lines)), make_context())
    ops = [op.operation for op in module.body.operations[0].regions[0].blocks[0].operations]
    model = CostModel()
    begin = time.process_time()
    total = sum(model.flops(op) for op in ops)
    seconds = time.process_time() - begin
    assert total == 20_000 * 128
    assert seconds < 1.0, seconds


def test_the_table_of_traits_names_only_ops_that_exist() -> None:
    context = make_context()
    sets = [value for value in vars(op_traits).values() if isinstance(value, frozenset)]
    assert sets
    assert not [name for names in sets for name in names if not context.is_registered_operation(name)]
    assert op_traits.TRANSCENDENTAL <= op_traits.ELEMENTWISE
    assert not op_traits.ELEMENTWISE & op_traits.NO_FLOPS


FUSED = """
func.func public @main(%x: tensor<64x64xf32>, %w: tensor<64x64xf32>) -> (tensor<64x64xf32>, tensor<64x64xf32>) {
  %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0]
    : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>
  %z = stablehlo.negate %x : tensor<64x64xf32>
  %a = stablehlo.abs %z : tensor<64x64xf32>
  return %y, %a : tensor<64x64xf32>, tensor<64x64xf32>
}
"""


SCATTERED = """
func.func public @main(%acc: tensor<1024x64xf32>, %at: tensor<8x1xi32>, %rows: tensor<8x64xf32>) -> (RESULTS) {
  %zero = stablehlo.constant dense<INITIAL> : tensor<f32>
  %zeros = stablehlo.broadcast_in_dim %zero, dims = [] : (tensor<f32>) -> tensor<1024x64xf32>
  %made = "stablehlo.scatter"(%zeros, %at, %rows) <{indices_are_sorted = false, scatter_dimension_numbers =
    #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0],
    index_vector_dim = 1>, unique_indices = false}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %c = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %c : tensor<f32>
  }) {bactrian.phase = "backward"} : (tensor<1024x64xf32>, tensor<8x1xi32>, tensor<8x64xf32>) -> tensor<1024x64xf32>
  %sum = stablehlo.add %acc, %made {bactrian.phase = "backward", MARK} : tensor<1024x64xf32>
  return VALUES
}
"""
WHOLE = 1024 * 64 * 4


@pytest.mark.parametrize(
    ("initial", "mark", "others", "in_place"),
    [
        ("0.0", "bactrian.accumulate", False, True),
        ("1.0", "bactrian.accumulate", False, False),
        ("0.0", "other", False, False),
        ("0.0", "bactrian.accumulate", True, False),
    ],
)
def test_scatters_into_an_accumulator_are_in_place(initial: str, mark: str, others: bool, in_place: bool) -> None:
    """XLA adds the rows to the accumulator: what is read and written are these, not all of it."""
    tensor = "tensor<1024x64xf32>"
    results, values = (f"{tensor}, {tensor}", "%sum, %made") if others else (tensor, "%sum")
    text = SCATTERED.replace("INITIAL", initial).replace("MARK", mark).replace("RESULTS", results)
    text = text.replace("VALUES", f"{values} : {results}")
    with make_context(), ir.Location.unknown():
        *_, scatter, add, _ = OpTimes.of(ir.Module.parse(text), "", silent).seconds
    if in_place:
        assert (scatter, add) == (pytest.approx((3 * 8 * 64 * 4 + 8 * 4) / 1e10), 0.0)
    else:
        assert min(scatter, add) >= 2 * WHOLE / 1e10


def silent(op: ir.Operation, text: str) -> None:
    """Nothing is told."""
    raise AssertionError(text)


def test_times_of_ops_know_what_is_fused_and_how_often_loops_run() -> None:
    with make_context(), ir.Location.unknown():
        product, negate, absolute, end = OpTimes.of(ir.Module.parse(FUSED), "", silent).seconds
        assert product == 2 * 64**3 / 5e10
        assert negate == 64 * 64 * 4 / 1e10, "it reads its operand, and writes nothing"
        assert absolute == 64 * 64 * 4 / 1e10, "it writes its result, and reads nothing"
        assert end == 0.0
        loops = [
            OpTimes.of(ir.Module.parse(FUNCTION.replace("BODY", LOOP.replace("LIMIT", str(limit)))), "", silent).seconds
            for limit in (9, 17)
        ]
    assert sum(loops[1]) == pytest.approx(2 * sum(loops[0]), rel=0.05)
