"""Why a value has its sharding: every figure against all choices there are, every reason on a program where it is known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import numpy as np
import pytest
import sharded
from jaxlib.mlir import ir

from bactrian.driver.report.explanation_table import memory_text, reason_text, render_value
from bactrian.driver.report.terminal import RichView
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import argument_roles, result_updates
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.sharding.baselines import pin_baseline
from bactrian.passes.sharding.cost_breakdown import bytes_sent
from bactrian.passes.sharding.explain import Alternative, Explanation, StageExplainer
from bactrian.passes.sharding.sharding_model import ShardingModel, step_seconds
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.stage_programs import StageProgram
from bactrian.passes.sharding.value_names import NamedValue, find_value, named_values
from bactrian.passes.sharding.work_from_ir import read_program

LINE: MeshAxes = (("x", 4),)
PLENTY = 1 << 40
# Links that make communication and work comparable, so that shardings differ.
FAST = HostGroup("fast", 1, 8, PLENTY, Device("fast", {"default": 1e9}, 1e9), 1e9, 1e9, 1e-6, 1e-6)

PRODUCTS = """
func.func public @main(%x: tensor<64x16xf32> {bactrian.role = "batch"} loc("batch"),
    %w: tensor<16x16xf32> {bactrian.role = "state"} loc("state['w']"))
    -> (tensor<64x16xf32>, tensor<16x16xf32> {bactrian.updates = 1 : i64}) {
  %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<64x16xf32>, tensor<16x16xf32>) -> tensor<64x16xf32> loc("jit(step)/jvp(net)/first/dot_general")
  %g = stablehlo.dot_general %x, %y, contracting_dims = [0] x [0] : (tensor<64x16xf32>, tensor<64x16xf32>) -> tensor<16x16xf32> loc("jit(step)/transpose(jvp(net))/first/dot_general")
  %n = stablehlo.subtract %w, %g : tensor<16x16xf32> loc("jit(step)/sub")
  return %y, %n : tensor<64x16xf32>, tensor<16x16xf32>
}"""


def explainer(
    body: str,
    axes: MeshAxes = LINE,
    *,
    limit: int = PLENTY,
    hosts: HostGroup = FAST,
    given: Mapping[int, str] | None = None,
    strategy: str = "auto",
) -> tuple[StageExplainer, list[NamedValue]]:
    """All about the one stage of a module."""
    sizes = ", ".join(f'"{name}"={size}' for name, size in axes)
    module = sharded.prepared(f"sdy.mesh @stage0 = <[{sizes}]>\n{body}", axes)
    mesh = hosts.mesh(axes)
    with module.context:
        main = main_function(module)
        program = StageProgram(
            0, "stage0", mesh, PLENTY, read_program(main, mesh, hosts, 1, lambda op, text: None), 1, 1
        )
        roles = argument_roles(main)
        first = frozenset(range(len(roles)))
        values = named_values([program])
        made = StageExplainer(program, values, strategy, roles, result_updates(main), limit, given or {}, first, 60.0)
        return made, values


def explained(made: tuple[StageExplainer, list[NamedValue]], name: str) -> Explanation:
    """About one of its values."""
    stage, values = made
    return stage.explain(find_value(values, name, None, lambda v: ""), time.monotonic() + 60.0)


TIED = PRODUCTS.replace(
    '{bactrian.role = "state"} loc("state[\'w\']"))',
    '{bactrian.role = "state"} loc("state[\'w\']"),\n    %z: tensor<16x16xf32> {bactrian.role = "state"} loc("state[\'z\']"))',
)


def brute_force(stage: StageExplainer, value: int, limit: int) -> dict[str, tuple[float | None, int]]:
    """For each sharding of a value, over all choices: the least seconds of those that fit, and the least peak of any."""
    model = ShardingModel(stage.reading.problem, stage.program.mesh)
    best = dict[str, tuple[float | None, int]]()
    for choice in itertools.product(*(range(len(costs)) for costs in model.network.costs)):
        shardings = model.shardings(choice)
        specs = dict(shardings.arguments)
        for op, strategy in zip(model.problem.ops, shardings.chosen, strict=True):
            if strategy is not None:
                specs |= dict(zip(op.results, strategy.results, strict=True))
        text = str(specs[value])
        peak = int(model.network.peak(choice))
        least, lowest = best.get(text, (None, peak))
        if peak <= limit:
            seconds = step_seconds(model, shardings).total
            least = seconds if least is None else min(least, seconds)
        best[text] = least, min(lowest, peak)
    return best


def check(found: Explanation, least: Mapping[str, tuple[float | None, int]], limit: int) -> None:
    """Every row is what brute force says."""
    assert {row.sharding for row in found.alternatives} == set(least)
    for row in found.alternatives:
        seconds, lowest = least[row.sharding]
        if seconds is None:
            assert row.seconds is None
            assert (row.memory_bytes, row.lacking_bytes) == (lowest, lowest - limit)
            continue
        assert row.seconds == pytest.approx(seconds, rel=1e-9)
        assert row.is_proved and row.lacking_bytes == 0
        assert row.memory_bytes is not None and row.memory_bytes <= limit
        assert sum(nbytes for _, nbytes in row.memory) == row.memory_bytes
    (chosen,) = (row for row in found.alternatives if row.is_chosen)
    assert (chosen.sharding, chosen.seconds) == (found.sharding, found.seconds)
    finished = [row.seconds for row in found.alternatives if row.seconds is not None]
    assert finished == sorted(finished)
    assert all(row.seconds is not None for row in found.alternatives[: len(finished)])


NAMES = ["batch", "state['w']", "jit(step)/jvp(net)/first/dot_general", "transpose(jvp(net))/first/dot_general"]


@pytest.mark.parametrize("name", NAMES)
def test_forced_shardings_cost_what_all_choices_say(name: str) -> None:
    made = explainer(PRODUCTS)
    found = explained(made, name)
    check(found, brute_force(made[0], find_value(made[1], name, None, lambda v: "").number, PLENTY), PLENTY)
    assert found.reason == "cheapest" and found.unlimited is None
    assert len({row.seconds for row in found.alternatives}) > 1


def peaks(body: str) -> list[int]:
    """All peaks of a program: the limits at which something changes."""
    network = explainer(body)[0].model.network
    choices = itertools.product(*(range(len(costs)) for costs in network.costs))
    return sorted({int(network.peak(choice)) for choice in choices})


@pytest.mark.parametrize("seed", range(20))
def test_bytes_sent_are_those_that_are_written(seed: int) -> None:
    """Of choices at random: what `sent` counts, and what the writer of shardings does."""
    axes, random = (("x", 2), ("y", 2)), np.random.default_rng(seed)
    module = sharded.prepared(f'sdy.mesh @stage0 = <["x"=2, "y"=2]>\n{(PRODUCTS, CONSTRAINED)[seed % 2]}', axes)
    reading, model = sharded.read(module, axes)
    shardings = model.shardings([int(random.integers(len(costs))) for costs in model.network.costs])
    with module.context, ir.Location.unknown():
        main = main_function(module)
        counted = bytes_sent(model, reading, shardings, 3, result_updates(main), range(2))
        writer = Writer(main, reading, model, shardings, "stage0", 3)
        write_stages([writer])
    assert counted == {kind: round(nbytes) for kind, nbytes in writer.sent_in_step.items()}


@pytest.mark.parametrize("name", NAMES)
def test_under_every_limit_rows_and_reasons_are_right(name: str) -> None:
    reasons = set[str]()
    for limit in peaks(PRODUCTS)[::3]:
        made = explainer(PRODUCTS, limit=limit)
        number = find_value(made[1], name, None, lambda v: "").number
        found = explained(made, name)
        limited, free = brute_force(made[0], number, limit), brute_force(made[0], number, PLENTY)
        check(found, limited, limit)
        best = min(seconds for seconds, _ in free.values() if seconds is not None)
        slower = found.seconds > best * (1 + 1e-9)
        assert (found.unlimited is not None) == slower
        own, _ = free[found.sharding]
        assert own is not None
        binds = slower and own > best * (1 + 1e-9)  # with this sharding, and no limit, a step would still be slower
        assert found.reason == ("memory" if binds else "cheapest")
        if found.unlimited is not None:
            assert found.unlimited.seconds == pytest.approx(best, rel=1e-9)
            assert found.unlimited.memory_bytes > limit
            assert free[found.unlimited.sharding][0] == pytest.approx(best, rel=1e-9)
        if binds:
            assert "memory binds: without a limit it would be" in reason_text(found)
        reasons.add(found.reason)
    assert "cheapest" in reasons
    if name != NAMES[2]:
        assert "memory" in reasons


def test_memory_does_not_bind_what_costs_nothing_to_cut() -> None:
    """An argument that nothing reads is cut where memory is short, which costs no time; other values cost some."""
    seen = set[tuple[bool, str]]()
    for limit in peaks(TIED)[::5]:
        found = explained(explainer(TIED, limit=limit), "state['z']")
        if found.unlimited is not None:
            assert not found.unlimited.binds and found.reason == "cheapest"
            seen.add((found.unlimited.sharding == found.sharding, found.sharding))
            assert memory_text(found).endswith("the limit costs time elsewhere, not here")
    assert any(not same for same, _ in seen)


def test_what_an_argument_was_given_is_said_and_compared() -> None:
    whole = 'bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"x"}, {}]>'
    made = explainer(PRODUCTS.replace('bactrian.role = "batch"', whole), given={0: "another step"})
    found = explained(made, "batch")
    assert (found.sharding, found.reason, found.given_by) == ("x,-", "given", "another step")
    free = explainer(PRODUCTS)
    check(
        Explanation(**{**vars(found), "seconds": next(r.seconds for r in found.alternatives if r.is_chosen)}),
        brute_force(free[0], 0, PLENTY),
        PLENTY,
    )
    best = found.alternatives[0]
    assert not best.is_chosen and f"{best.sharding} would take" in reason_text(found)


CONSTRAINED = """
func.func public @main(%a: tensor<64x16xf32> {bactrian.role = "state"} loc("a"),
    %b: tensor<16x16xf32> {bactrian.role = "state"} loc("b")) -> (tensor<64x16xf32> {jax.result_info = ""}) {
  %y = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<64x16xf32>, tensor<16x16xf32>) -> tensor<64x16xf32> loc("net/dot"("/home/user/model.py":4:2))
  %k = sdy.sharding_constraint %y <@stage0, [{}, {"x"}]> : tensor<64x16xf32> loc("net/constraint"("/home/user/model.py":5:2))
  %r = stablehlo.add %k, %k : tensor<64x16xf32> loc("net/add")
  return %r : tensor<64x16xf32>
}"""


def test_a_constraint_binds_its_value_and_is_named_where_it_is_read() -> None:
    made = explainer(CONSTRAINED)
    found = explained(made, "net/constraint")
    assert (found.sharding, found.reason, found.given_by) == ("-,x", "given", "a sharding constraint at model.py:5")
    assert {row.sharding for row in found.alternatives} == {"-,-", "x,-", "-,x"}
    free = explainer(CONSTRAINED.replace('sdy.sharding_constraint %y <@stage0, [{}, {"x"}]>', "stablehlo.abs %y"))
    before = explained(made, "net/dot")
    assert before.reason != "given"
    assert before.notes == ("a sharding constraint at model.py:5 reads it as -,x",)
    assert explained(free, "net/dot").notes == ()


def test_a_named_strategy_gives_shardings() -> None:
    made = explainer(PRODUCTS, strategy="data")
    found = explained(made, "state['w']")
    assert (found.sharding, found.reason, found.given_by) == ("-,-", "given", "strategy data")
    stage = made[0]
    free = pin_baseline(stage.program.reading, stage.program.mesh, stage.roles, "data")
    assert dict(free.problem.pinned)[1].is_replicated  # the other rows are those without it
    assert len(found.alternatives) == 3


def test_the_next_value_of_a_state_says_so() -> None:
    made = explainer(PRODUCTS)
    assert explained(made, "jit(step)/sub").notes == (
        f"it is the next value of state['w'], which is {made[0].sharding(1)}",
    )


UNEVEN = """
func.func public @main(%a: tensor<6x8xf32> {bactrian.role = "state"} loc("a")) -> (tensor<6x8xf32> {jax.result_info = ""}) {
  %r = stablehlo.concatenate %a, dim = 1 : (tensor<6x8xf32>) -> tensor<6x8xf32> loc("net/concatenate")
  return %r : tensor<6x8xf32>
}"""


def test_dims_that_are_not_divided_are_impossible() -> None:
    made = explainer(UNEVEN, (("x", 2), ("y", 4)))
    found = explained(made, "a")
    assert {row.sharding for row in found.alternatives} == {"-,-", "x,-", "-,x", "-,y", "-,x+y", "x,y"}
    (cut,) = found.impossible
    assert (cut.dim, cut.size, cut.axes, cut.num_devices, cut.op) == (0, 6, ("y",), 4, "")
    assert "dim 0 of size 6 over y: 4 devices don't divide it" in RichView(render_value(found)).text()
    made_by_op = explained(made, "net/concatenate")
    assert [(cut.dim, cut.axes, cut.op) for cut in made_by_op.impossible] == [
        (0, ("y",), ""),
        (1, ("x",), "stablehlo.concatenate"),
        (1, ("y",), "stablehlo.concatenate"),
    ]
    assert "stablehlo.concatenate needs it replicated" in RichView(render_value(made_by_op)).text()


SOURCES = """
func.func public @main(%a: tensor<7xf32> {bactrian.role = "state"} loc("a"))
    -> (tensor<7xf32> {jax.result_info = ""}, tensor<8xf32>) {
  %i = stablehlo.iota dim = 0 : tensor<8xf32> loc("net/iota")
  return %a, %i : tensor<7xf32>, tensor<8xf32>
}"""


def test_values_without_a_choice() -> None:
    made = explainer(SOURCES)
    free, only = explained(made, "iota"), explained(made, "a")
    assert (free.reason, free.sharding, free.alternatives) == ("free", "any", ())
    assert "any sharding costs nothing" in RichView(render_value(free)).text()
    assert (only.reason, only.sharding, len(only.alternatives)) == ("only", "-", 1)
    assert "there is no other sharding" in RichView(render_value(only)).text()


def test_what_is_not_finished_is_said_to_be_so() -> None:
    stage, values = explainer(PRODUCTS)
    assert stage.solution.optimal
    found = stage.explain(find_value(values, "batch", None, lambda v: ""), time.monotonic())
    others = [row for row in found.alternatives if not row.is_chosen]
    assert len(others) == 2
    assert all(row.seconds is None and row.bound_seconds == stage.solution.lower_bound for row in others)
    text = RichView(render_value(found)).text()
    assert text.count("not finished") == 2 and "--time-limit" in text and "no other was found" in text


def test_what_is_found_without_proof_is_marked() -> None:
    row = Alternative("x", seconds=2.0, bound_seconds=1.0)
    assert not row.is_proved
    assert Alternative("x", seconds=2.0, bound_seconds=2.0).is_proved
    assert not Alternative("x", bound_seconds=2.0).is_proved
    stage, values = explainer(PRODUCTS)
    found = stage.explain(values[0], time.monotonic() + 60)
    unproved = Explanation(**{**vars(found), "alternatives": (found.alternatives[0], row)})
    text = RichView(render_value(unproved)).text()
    assert "≤ 2.00 s" in text and "not proved to be the least" in text


def test_names() -> None:
    repeated = PRODUCTS.replace("jit(step)/sub", "jit(step)/jvp(net)/first/dot_general")
    values = explainer(repeated)[1]

    def number(text: str) -> int:
        return find_value(values, text, None, lambda v: "-,-").number

    assert number("state['w']") == number("['w']") == number("te['w") == 1
    assert number("jit(step)/jvp(net)/first/dot_general@2") == 4
    with pytest.raises(ConfigError) as several:
        number("step/net/first/dot_general")
    lines = str(several.value).splitlines()
    assert lines[0] == "'step/net/first/dot_general' is ambiguous: it matches 3 values"
    assert [line.split()[0] for line in lines[2:5]] == [
        "jit(step)/jvp(net)/first/dot_general@1",
        "jit(step)/transpose(jvp(net))/first/dot_general",
        "jit(step)/jvp(net)/first/dot_general@2",
    ]
    assert lines[2].split()[1:3] == ["f32[64,16]", "-,-"]
    for text in ("statw", "stat['w]"):
        with pytest.raises(ConfigError, match=r"no value is called .*\n.*\n.*did you mean state\['w'\]"):
            number(text)
    with pytest.raises(ConfigError, match=r"no value is called ''"):
        number("")


IMAGE = """
func.func public @main(%x: tensor<1x512x64x8xf32> {bactrian.role = "batch"} loc("batch"),
    %k: tensor<3x3x8x8xf32> {bactrian.role = "state"} loc("state['k']")) -> tensor<1x512x64x8xf32> {
  %y = stablehlo.convolution(%x, %k) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {pad = [[1, 1], [1, 1]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x512x64x8xf32>, tensor<3x3x8x8xf32>) -> tensor<1x512x64x8xf32> loc("net/conv")
  return %y : tensor<1x512x64x8xf32>
}"""


def test_borders_are_said() -> None:
    """A row of 64 x 8 numbers each way; with another dim cut, or none, everything takes longer."""
    found = explained(explainer(IMAGE), "batch")
    assert found.sharding == "-,x,-,-"
    assert found.notes == (
        "net/conv exchanges a halo, rows: 1 of dim 1 (x) and 1 of dim 1 (x); 4,096 bytes, 6.1e-06 s",
    )
    chosen = found.alternatives[0]
    assert chosen.is_chosen
    assert dict(chosen.sent_bytes) == {"collective_permute": 2 * 64 * 8 * 4}
    columns = next(row for row in found.alternatives if row.sharding == "-,-,x,-")
    assert dict(columns.sent_bytes)["collective_permute"] == 2 * 512 * 8 * 4
