"""The contracts of ``docs/ir.md``: each accepts what the passes leave, and refuses a module that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

import bactrian
from bactrian.driver import opt
from bactrian.passes import pipelines
from bactrian.passes.frame import registry
from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import PassError
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import argument_attributes, integer, result_attributes
from bactrian.passes.ir.gradient_boundary_op import find_boundary, set_boundary_words
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, main_function, set_operand, terminator

MESH = "data=2"
Breaks = Callable[[ir.Module], None]


def train(state: Any, batch: jax.Array) -> Any:
    """Two layers; the second weight's sharding is asked for."""
    mesh = AbstractMesh((2,), ("data",))

    def loss(weights: Any) -> jax.Array:
        first, second = weights
        second = jax.lax.with_sharding_constraint(second, NamedSharding(mesh, P("data", None)))
        return jnp.square(jnp.tanh(batch @ first) @ second).mean()

    value, gradients = bactrian.value_and_grad(loss)(state)
    return jax.tree.map(lambda w, g: w - 0.1 * g, state, gradients), value


def module_after(name: str, num_stages: int = 2) -> ir.Module:
    """The step as a pass of the whole pipeline leaves it, on meshes of two devices."""
    state, batch = (jnp.ones((16, 8)), jnp.ones((8, 8))), jnp.ones((4, 16))
    module = bactrian.parallelize(train, num_microbatches=2).trace(state, batch).captured.module()
    steps = pipelines.stage_step(num_stages, mesh=MESH)
    last = next(i for i, step in enumerate(steps) if isinstance(step, Pass) and step.name == name)
    run_pipeline(module, steps[: last + 1], verify_contracts=True)
    return module


def op_named(module: ir.Module, name: str, phase: str | None = None) -> ir.Operation:
    """The first op of ``@main`` of a name, and of a phase if one is given."""
    for each in body(main_function(module)).operations:
        if each.operation.name == name and phase in (None, *_word(each.operation, "bactrian.phase")):
            return each.operation
    raise AssertionError(f"no {name}")


def _word(op: ir.Operation, name: str) -> list[str]:
    return [ir.StringAttr(op.attributes[name]).value] if name in op.attributes else []


def set_attribute(name: str, text: str | None, op: str = "", phase: str | None = None) -> Breaks:
    """Writes an attribute of an op of ``@main`` (of the module without a name), or takes it away."""

    def change(module: ir.Module) -> None:
        owner = op_named(module, op, phase) if op else module.operation
        if text is None:
            del owner.attributes[name]
        else:
            owner.attributes[name] = ir.Attribute.parse(text)

    return change


def set_entry(table: str, number: int, name: str, text: str | None) -> Breaks:
    """Writes an attribute of an argument or a result of ``@main``, or takes it away."""

    def change(module: ir.Module) -> None:
        main = main_function(module)
        entries = argument_attributes(main) if table == "arg_attrs" else result_attributes(main)
        if text is None:
            del entries[number][name]
        else:
            entries[number][name] = ir.Attribute.parse(text)
        main.attributes[table] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])

    return change


def reduce_by(*words: str) -> Breaks:
    """Writes the boundary's reductions."""

    def change(module: ir.Module) -> None:
        boundary = find_boundary(main_function(module))
        set_boundary_words(boundary, ["loss", "gradient", "gradient"], list(words))

    return change


def insert(text: str) -> Breaks:
    """Adds something to the module."""

    def change(module: ir.Module) -> None:
        for each in ir.Module.parse(text).body.operations:
            each.operation.clone(ip=ir.InsertionPoint(module.body))

    return change


def erase_mesh(module: ir.Module) -> None:
    """Takes a stage's mesh away, by another name."""
    for each in module.body.operations:
        if each.operation.name == "sdy.mesh":
            each.operation.attributes["sym_name"] = ir.StringAttr.get("other")
            return


def second_boundary(module: ir.Module) -> None:
    """Marks the gradients a second time."""
    boundary = find_boundary(main_function(module))
    boundary.clone(ip=ir.InsertionPoint(boundary))


def read_the_batch_below(module: ir.Module) -> None:
    """Lets the update read a batch argument."""
    main = main_function(module)
    batch = body(main).arguments[2]
    with ir.InsertionPoint(terminator(main)), ir.Location.unknown():
        kind = ir.RankedTensorType.get([], ir.F32Type.get())
        made = ir.Operation.create(
            "stablehlo.custom_call", [kind], [batch], {"call_target_name": ir.StringAttr.get("f")}
        )
    set_operand(terminator(main), 2, made.results[0])


def read_forward_below(module: ir.Module) -> None:
    """Lets the update read a forward value of its own type."""
    flow = MainDataflow.of(main_function(module))
    forward = [v for i, op in enumerate(flow.ops[: flow.boundary]) if flow.phases[i] == "forward" for v in op.results]
    for op in flow.ops[flow.boundary + 1 : -1]:
        for number, value in enumerate(op.operands):
            if found := [each for each in forward if each.type == value.type]:
                set_operand(op, number, found[0])
                return
    raise AssertionError("nothing fits")


def lower_the_last_layer(module: ir.Module) -> None:
    """Puts the last forward op below its operands' layer."""
    flow = MainDataflow.of(main_function(module))
    last = max(i for i, phase in enumerate(flow.phases) if phase == "forward")
    flow.ops[last].attributes["bactrian.layer"] = integer(0)


def pin_elsewhere(module: ir.Module) -> None:
    """Pins the first layer's weight to the last stage."""
    main = main_function(module)
    entries = argument_attributes(main)
    entries[0]["bactrian.pinned_stages"] = ir.ArrayAttr.get([integer(1)])
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])
    module.operation.attributes["bactrian.num_stages"] = integer(2)


def move_constant(module: ir.Module) -> None:
    """Puts a constant on another stage than its reader's."""
    flow = MainDataflow.of(main_function(module))
    for op, stage in zip(flow.ops, flow.stages, strict=True):
        if op.name == "stablehlo.constant" and stage is not None:
            op.attributes["bactrian.stage"] = integer(1 - stage)
            return


def widen_a_result(module: ir.Module) -> None:
    """Gives a result of the boundary another type than its operand's."""
    boundary = find_boundary(main_function(module))
    boundary.results[1].set_type(ir.RankedTensorType.get([3], ir.F32Type.get()))


def call_the_host(module: ir.Module) -> None:
    """Adds a callback to Python."""
    with ir.InsertionPoint(find_boundary(main_function(module))), ir.Location.unknown():
        ir.Operation.create(
            "stablehlo.custom_call", [], [], {"call_target_name": ir.StringAttr.get("xla_python_cpu_callback")}
        )


def manual_computations(module: ir.Module) -> list[ir.Operation]:
    """The bodies of the stage functions."""
    found = [
        each.operation.regions[0].blocks[0].operations[0].operation
        for each in module.body.operations
        if each.operation.name == "func.func"
    ]
    return [op for op in found if op.name == "sdy.manual_computation" and len(op.operands)]


def shard_inside(module: ir.Module) -> None:
    """Gives an op of the program of one device a sharding."""
    op = manual_computations(module)[0].regions[0].blocks[0].operations[0].operation
    op.attributes["sdy.sharding"] = ir.Attribute.parse("#sdy.sharding_per_value<[<@stage0, []>]>")


def constrain_inside(module: ir.Module) -> None:
    """Leaves a constraint in the program of one device."""
    block = manual_computations(module)[0].regions[0].blocks[0]
    sharding = ir.Attribute.parse("#sdy.sharding<@stage0, [{}, {}]>")
    argument = next(value for value in block.arguments if ir.RankedTensorType(value.type).rank == 2)
    with ir.InsertionPoint.at_block_begin(block):
        ir.Operation.create("sdy.sharding_constraint", [argument.type], [argument], {"sharding": sharding})


def replicate_inputs(module: ir.Module) -> None:
    """Says that the inputs of a program of one device are sharded otherwise than the function's."""
    for manual in manual_computations(module):
        text = str(manual.attributes["in_shardings"])
        if '"data"' in text:
            manual.attributes["in_shardings"] = ir.Attribute.parse(text.replace('{"data"}', "{}"))
            return


def work_outside(module: ir.Module) -> None:
    """Puts an op beside the program of one device."""
    manual = manual_computations(module)[0]
    with ir.InsertionPoint(manual):
        ir.Operation.create("stablehlo.negate", [manual.operands[0].type], [manual.operands[0]])


REFUSED: list[tuple[str, str, Breaks, str]] = [
    ("captured", "verify-program", set_attribute("bactrian.num_microbatches", None), "num_microbatches is None"),
    ("captured", "verify-program", set_attribute("bactrian.schedule", '"fifo"'), "'fifo', which is unknown"),
    ("captured", "verify-program", set_entry("arg_attrs", 0, "bactrian.role", '"weight"'), "must be one of state"),
    ("captured", "verify-program", set_entry("res_attrs", 0, "bactrian.updates", "2 : i64"), "which is no state"),
    ("captured", "verify-program", set_entry("res_attrs", 0, "bactrian.updates", None), "0 next values"),
    (
        "captured",
        "verify-program",
        set_entry("arg_attrs", 0, "bactrian.pinned_stages", "[4]"),
        "bactrian.pinned_stages names stages",
    ),
    ("captured", "verify-program", reduce_by("mean", "median", "mean"), "'median' of the boundary is unknown"),
    ("captured", "verify-program", reduce_by("mean", "mean"), "one kind, one reduction"),
    ("captured", "verify-program", reduce_by("mean", "concat", "mean"), "over 2 microbatches gives"),
    ("flat", "flatten-calls", insert("func.func private @other()"), "a function besides @main"),
    ("adopted", "adopt-shardings", insert('sdy.mesh @mine = <["data"=2]>'), "a mesh of the user's is left: @mine"),
    (
        "adopted",
        "adopt-shardings",
        set_entry("arg_attrs", 0, "sdy.sharding", '#sdy.sharding<@user, [{"data", ?}, {}]>'),
        "leaves a dim open",
    ),
    (
        "adopted",
        "adopt-shardings",
        set_entry("res_attrs", 0, "sdy.sharding", "#sdy.sharding<@user, [{}, {}]>"),
        "must have a constraint",
    ),
    (
        "adopted",
        "adopt-shardings",
        set_entry("arg_attrs", 0, "sdy.sharding", '#sdy.sharding<@stage0, [{"data"}, {}]>'),
        "is not over @user",
    ),
    ("verified", "verify-program", second_boundary, "2 gradient boundaries"),
    ("verified", "verify-program", read_the_batch_below, "around the boundary"),
    ("verified", "verify-program", call_the_host, "talks to the host"),
    ("phased", "infer-phases", set_attribute("bactrian.phase", None, "stablehlo.tanh"), "phase is None before"),
    ("phased", "infer-phases", set_attribute("bactrian.phase", '"update"', "stablehlo.tanh"), "must be forward or"),
    ("phased", "infer-phases", read_forward_below, "reads a forward value around the boundary"),
    ("layered", "group-layers", set_attribute("bactrian.num_layers", None), "num_layers is None"),
    ("layered", "group-layers", set_attribute("bactrian.layer", "2 : i64", "stablehlo.tanh"), "from 0 to 1"),
    ("layered", "group-layers", lower_the_last_layer, "a forward value goes from layer 1 to layer 0"),
    ("layered", "group-layers", pin_elsewhere, "layer 0 reads an argument that is pinned to stages 1"),
    ("assigned", "assign-stages", set_attribute("bactrian.num_stages", None), "num_stages is None"),
    ("assigned", "assign-stages", erase_mesh, "has no mesh"),
    ("assigned", "assign-stages", set_attribute("bactrian.stage", "2 : i64", "stablehlo.tanh"), "from 0 to 1"),
    ("assigned", "assign-stages", set_attribute("bactrian.stage", "1 : i64", "stablehlo.tanh"), "is on stages"),
    ("localized", "clone-cheap-ops", move_constant, "cheap to compute again goes from stage"),
    ("accumulated", "accumulate-gradients", reduce_by("accumulated", "sum", "accumulated"), "sum has no accumulator"),
    (
        "accumulated",
        "accumulate-gradients",
        set_attribute("bactrian.accumulate", "unit", "stablehlo.tanh"),
        "none of stablehlo.add",
    ),
    (
        "accumulated",
        "accumulate-gradients",
        set_attribute("bactrian.phase", '"forward"', "stablehlo.constant", "initialize"),
        "does not begin with a value of the initialize phase",
    ),
    ("accumulated", "accumulate-gradients", widen_a_result, "its result is tensor<3xf32>"),
    ("accumulated", "accumulate-gradients", set_attribute("bactrian.num_microbatches", "1 : i64"), "one microbatch"),
    ("sharded", "solve-shardings", set_attribute("bactrian.sharding", None), "one entry for each of 2 stages"),
    ("sharded", "solve-shardings", set_attribute("sdy.sharding", None, "stablehlo.tanh"), "0 shardings for 1 results"),
    ("sharded", "solve-shardings", set_entry("arg_attrs", 0, "sdy.sharding", None), "has no sdy.sharding"),
    (
        "sharded",
        "solve-shardings",
        set_entry("arg_attrs", 1, "sdy.sharding", '#sdy.sharding<@stage1, [{}, {"data", ?}]>'),
        "leaves a dim open",
    ),
    (
        "sharded",
        "solve-shardings",
        set_entry("res_attrs", 0, "sdy.sharding", '#sdy.sharding<@stage0, [{"data"}, {}]>'),
        "sharded otherwise than the argument",
    ),
    (
        "sharded",
        "solve-shardings",
        set_attribute("sdy.sharding", "#sdy.sharding_per_value<[<@stage1, [{}, {}]>]>", "stablehlo.tanh"),
        "an op of stage 0 has a sharding over",
    ),
    ("split", "split-stages", set_entry("arg_attrs", 0, "bactrian.role", None), "bactrian.role is None"),
    ("split", "split-stages", set_entry("arg_attrs", 0, "bactrian.argument", None), "no bactrian.argument"),
    ("split", "split-stages", set_entry("res_attrs", 0, "bactrian.result", None), "no bactrian.result"),
    ("split", "split-stages", set_attribute("bactrian.phase", '"later"', "mpmd.fragment_call"), "must be one of"),
    ("split", "split-stages", set_attribute("bactrian.stage", "1 : i64", "mpmd.fragment_call"), "stage and phase say"),
    ("split", "split-stages", insert("func.func private @stage9.forward() { return }"), "is called by nobody"),
    (
        "partitioned",
        "partition",
        shard_inside,
        "an op of the program of one device has sdy.sharding",
    ),
    ("partitioned", "partition", constrain_inside, "sdy.sharding_constraint is left in the program of one device"),
    ("partitioned", "partition", replicate_inputs, "in_shardings has"),
    ("partitioned", "partition", work_outside, "is not one sdy.manual_computation"),
    ("scheduled", "schedule-microbatches", set_attribute("bactrian.order", '[["F0"]]'), "one list for each of 2"),
    (
        "scheduled",
        "schedule-microbatches",
        set_attribute("bactrian.order", '[["F0", "B0", "F1"], ["FB0", "FB1"]]'),
        "stage 0 does not run each",
    ),
    (
        "scheduled",
        "schedule-microbatches",
        set_attribute("bactrian.order", '[["F0", "B1", "B0", "F1"], ["FB0", "FB1"]]'),
        "the backward of microbatch 1 before its forward",
    ),
]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The step after each pass that a case needs, as text with locations; every contract on the way holds."""
    names = sorted({name for _, name, _, _ in REFUSED})
    return {name: str(module_after(name).operation.get_asm(enable_debug_info=True)) for name in names}


@pytest.mark.parametrize(
    ("contract", "name", "breaks", "message"), REFUSED, ids=[f"{c}-{m[:24]}" for c, _, _, m in REFUSED]
)
def test_a_contract_refuses(texts: dict[str, str], contract: str, name: str, breaks: Breaks, message: str) -> None:
    assert contract in registry.load(name).ensures
    with make_context():
        module = ir.Module.parse(texts[name])
        registry.load_contracts([contract])(module)
        with ir.Location.unknown():
            breaks(module)
        with pytest.raises(PassError, match="is broken") as caught:
            registry.load_contracts([contract])(module)
    assert message in str(caught.value) and f"contract {contract!r}" in str(caught.value)
    assert caught.value.where or contract == "split"  # calls and transfers have no place in the user's program


def test_every_contract_refuses_something_and_is_ensured_by_a_pass() -> None:
    ensured = {name for flag in registry.PASSES for name in registry.load(flag).ensures}
    assert ensured == {contract for contract, _, _, _ in REFUSED}


def test_the_command_verifies_contracts(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.mlir"
    path.write_text(
        """module attributes {bactrian.num_layers = 2 : i64} {
  func.func public @main(%x: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
    %y = stablehlo.negate %x {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : tensor<f32> loc("step.py":7:1)
    %z = stablehlo.negate %y {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : tensor<f32> loc("step.py":8:1)
    return %z : tensor<f32>
  }
}"""
    )
    assert opt.main([str(path), "--assign-stages"]) == 0
    arguments = [str(path), "--assign-stages", f"--reproducer-dir={tmp_path}", "--verify-contracts"]
    assert opt.main(arguments) == 5
    error = capfd.readouterr().err
    assert "contract 'layered' is broken: a forward value goes from layer 1 to layer 0" in error
    assert "where: step.py:8" in error and "--run-reproducer --verify-contracts" in error
