"""Pipelines: the grammar, the runner, statistics, diagnostics and reproducers."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame import pipeline, pipeline_text, reproducer
from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError, PassError, ProgramError

MODULE = """
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.tanh %arg0 : tensor<f32> loc("jit(f)/late"("user.py":30:1))
  %1 = stablehlo.tanh %0 : tensor<f32>
    loc("jit(f)/early"(callsite("g"("/x/site-packages/lib.py":9:9) at "f"("user.py":4:1))))
  return %1 : tensor<f32>
}
"""


@dataclass(frozen=True)
class Probe(Pass):
    """Counts and complains as its options say."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "Do what a test asks for"
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("num-tanh", "Number of tanh ops"),)
    action: str = option("count", help="what to do")
    limit: int | None = option(None, help="an optional number")
    ratio: float = option(0.5, help="a number")
    strict: bool = option(False, help="a switch")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        main = module.body.operations[0]
        for op in main.regions[0].blocks[0].operations:
            if op.operation.name != "stablehlo.tanh":
                continue
            ctx.count("num-tanh")
            if self.action == "error":
                ctx.error(op, "no tanh here", why="it saturates", fix="use relu")
            if self.action == "remark":
                ctx.remark(op, "a tanh")
        if self.action == "many":
            for _ in range(15):
                ctx.error(main, "again")
        if self.action == "crash":
            raise KeyError("lost")
        if self.action == "break":
            ops = main.regions[0].blocks[0].operations
            ops[1].operation.move_before(ops[0].operation)
        if self.action == "interrupt":
            raise KeyboardInterrupt


@pytest.fixture
def module():
    with make_context():
        yield ir.Module.parse(MODULE)


def _random_elements(rng: random.Random, depth: int) -> tuple[pipeline_text.Element, ...]:
    values = [None, "1", "true", "a b", "", "{x=1 y=2}", "[1, 2]", "it's", 'say "x"', "a,b", "1.5e-3", "a=b"]
    found: list[pipeline_text.Element] = []
    for _ in range(rng.randrange(4)):
        name = rng.choice(["canonicalize", "flatten-calls", "func.func", "a.b", "x_y"])
        if depth and rng.random() < 0.4:
            found.append(pipeline_text.Element(name, children=_random_elements(rng, depth - 1)))
        else:
            options = tuple((rng.choice("abc") + str(i), rng.choice(values)) for i in range(rng.randrange(3)))
            found.append(pipeline_text.Element(name, options))
    return tuple(found)


def test_print_then_parse_is_the_identity() -> None:
    rng = random.Random(0)
    for _ in range(500):
        elements = _random_elements(rng, 3)
        text = pipeline_text.print_pipeline(elements)
        if len(elements) == 1 and elements[0].name == pipeline_text.ANCHOR:
            continue
        assert pipeline_text.parse_pipeline(text) == elements, text
        assert pipeline_text.parse_pipeline(f"builtin.module({text})") == elements


@pytest.mark.parametrize("text", ["a", "a,b", "a{x=1 y=z},func.func(c,d{e})", "a{x={b c}}", "func.func(a(b),c)"])
def test_parse_then_print_is_the_identity(text: str) -> None:
    assert pipeline_text.print_pipeline(pipeline_text.parse_pipeline(text)) == text


@pytest.mark.parametrize(
    ("text", "column"), [("a{", 3), ("a(b", 4), ("a,,b", 3), ("a)", 2), ("a{x='y}", 5), ("a b", 3), ("a{x={}", 7)]
)
def test_malformed_pipelines_name_the_column(text: str, column: int) -> None:
    with pytest.raises(ConfigError, match=f"column {column}:"):
        pipeline_text.parse_pipeline(text)


def test_an_unknown_pass_lists_the_three_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown pass 'flaten-calls'") as caught:
        pipeline.resolve("flaten-calls")
    nearest = re.search("nearest: (.*)", str(caught.value))
    assert nearest and nearest[1].split(", ")[0] == "flatten-calls" and len(nearest[1].split(", ")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flatten-calls{depth=1}", "no option 'depth'"),
        ("canonicalize{depth=1}", "bad options of pass 'canonicalize'"),
        ("func.func(flatten-calls)", "runs on builtin.module, not on func.func"),
        ("func.func(flaten)", "unknown pass 'flaten'"),
        ("any(" * 2000, "more than 100 pass managers in each other"),
    ],
)
def test_wrong_pipelines_are_refused_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        pipeline.resolve(text)


def test_options_survive_text() -> None:
    for probe in (Probe(), Probe("a b", 3, 0.25, True), Probe(limit=None, strict=True)):
        assert Probe.from_options(probe.option_texts()) == probe
    assert str(pipeline.to_element(Probe("a b", 3, strict=True))) == 'probe{action="a b" limit=3 strict=true}'
    assert Probe.from_options({"limit": "none", "strict": ""}) == Probe(strict=True)
    for text in ("999999999999999999999", "-999999999999999999999"):
        with pytest.raises(ConfigError, match=rf"option 'limit' of pass probe is {text}, must be from -2\^48 to 2\^48"):
            Probe.from_options({"limit": text})
    with pytest.raises(ConfigError, match="option 'limit' of pass probe needs int, got 'x'"):
        Probe.from_options({"limit": "x"})


def test_statistics_and_mlir_passes_in_one_run(module: ir.Module) -> None:
    report = pipeline.run_pipeline(module, [Probe(), "cse,func.func(canonicalize)", Probe(action="remark")])
    assert [run.counts for run in report.runs] == [{"num-tanh": 2}, {"num-tanh": 2}]
    assert "(S)     2 num-tanh - Number of tanh ops" in report.statistics_text()
    assert [d.severity for d in report.diagnostics] == ["remark", "remark"]


def test_errors_are_collected_sorted_and_name_the_users_lines(module: ir.Module) -> None:
    with pytest.raises(ProgramError) as caught:
        pipeline.run_pipeline(module, [Probe(action="error")])
    text = str(caught.value)
    assert text.startswith("no tanh here\n  where: user.py:4 (jit(f)/early)\n  why: it saturates\n  fix: use relu")
    assert "also: no tanh here\n  where: user.py:30 (jit(f)/late)" in text
    assert "reproducer" not in text


def test_at_most_ten_errors_are_shown(module: ir.Module) -> None:
    with pytest.raises(ProgramError) as caught:
        pipeline.run_pipeline(module, [Probe(action="many")])
    assert str(caught.value).count("again") == 10
    assert "5 more errors not shown" in str(caught.value)


def test_a_pass_that_crashes_leaves_a_reproducer(module: ir.Module, tmp_path) -> None:
    with pytest.raises(PassError, match="pass probe failed\n  why: KeyError: 'lost'") as caught:
        passes = ["cse", Probe(action="crash"), "canonicalize"]
        pipeline.run_pipeline(module, passes, reproducer_dir=str(tmp_path), verify_contracts=False)
    assert isinstance(caught.value.__cause__, KeyError)
    (path,) = tmp_path.iterdir()
    assert str(caught.value).endswith(f"\n  reproducer: bactrian-opt --run-reproducer {path}")
    text = path.read_text()
    assert reproducer.read_pipeline(text, "x") == "builtin.module(probe{action=crash},canonicalize)"
    assert "// jaxlib: " in text and "stablehlo.tanh" in text and '"user.py":30:1' in text
    ir.Module.parse(text)


def test_a_pass_that_breaks_the_module_is_caught_by_the_verifier(module: ir.Module, tmp_path) -> None:
    with pytest.raises(PassError, match="in or after pass probe") as caught:
        pipeline.run_pipeline(module, [Probe(action="break"), "canonicalize"], reproducer_dir=str(tmp_path))
    assert "does not dominate" in str(caught.value)
    (path,) = tmp_path.iterdir()
    ir.Module.parse(path.read_text())  # the reproducer holds the module before it broke


def test_an_invalid_module_is_refused_before_the_first_pass(module: ir.Module) -> None:
    ops = module.body.operations[0].regions[0].blocks[0].operations
    ops[1].operation.move_before(ops[0].operation)
    with pytest.raises(PassError, match="invalid before the first pass"):
        pipeline.run_pipeline(module, [Probe()])


def test_an_interrupt_stays_an_interrupt(module: ir.Module) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_pipeline(module, [Probe(action="interrupt")])
