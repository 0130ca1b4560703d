"""Analyses that a pass keeps for the next: they say what a fresh reading says, and end with the first change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from jaxlib.mlir import ir
from models import ONE_OF_EACH, train_case

import bactrian
from bactrian.passes.frame.base import Pass, PassContext
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function

MODULE = """
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.tanh %arg0 : tensor<f32>
  return %0 : tensor<f32>
}
"""


@dataclass(frozen=True)
class Keeper(Pass):
    """Keeps what it read."""

    name: ClassVar[str] = "keeper"
    summary: ClassVar[str] = "keep the data flow"

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        ctx.keep(MainDataflow.of(main_function(module)))


@dataclass(frozen=True)
class Looker(Pass):
    """Writes down what it is given, and keeps nothing."""

    name: ClassVar[str] = "looker"
    summary: ClassVar[str] = "look for a data flow"

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        module.operation.attributes["test.seen"] = ir.BoolAttr.get(ctx.kept(MainDataflow) is not None)


@pytest.mark.parametrize(
    ("passes", "seen"),
    [
        ([Keeper(), Looker()], True),
        ([Keeper(), "canonicalize", Looker()], False),
        ([Keeper(), Looker(), Looker()], False),
    ],
)
def test_an_analysis_reaches_the_next_pass_and_no_further(passes: list[Any], seen: bool) -> None:
    with make_context():
        module = ir.Module.parse(MODULE)
        run_pipeline(module, passes)
        assert ir.BoolAttr(module.operation.attributes["test.seen"]).value is seen


def test_a_run_that_goes_on_gets_what_the_last_pass_kept() -> None:
    with make_context():
        module = ir.Module.parse(MODULE)
        first = run_pipeline(module, [Keeper()])
        assert not run_pipeline(module, [Keeper(), "canonicalize"]).kept
        run_pipeline(module, [Looker()], kept=first.kept)
        assert ir.BoolAttr(module.operation.attributes["test.seen"]).value


def _numbers(flow: MainDataflow) -> tuple[Any, ...]:
    return flow.operands, flow.results, flow.producer, flow.ops, flow.values, flow.phases, flow.stages, flow.sizes


@pytest.mark.parametrize("model", ONE_OF_EACH)
def test_what_passes_keep_is_what_is_there(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    original = MainDataflow.kept_or_read

    def checking(_: type[MainDataflow], module: ir.Module, ctx: PassContext) -> MainDataflow:
        flow = original(module, ctx)
        if ctx.kept(MainDataflow) is not None:
            assert _numbers(flow.again()) == _numbers(MainDataflow.of(main_function(module)))
            checked.append(model)
        return flow

    monkeypatch.setattr(MainDataflow, "kept_or_read", classmethod(checking))
    built = train_case(model).make()
    step = bactrian.parallelize(built.step, **{"num_stages": 2, "num_microbatches": 2, **built.options})
    step.trace(built.state, *built.batches[0]).plan()
    assert len(checked) == 2  # assign-stages and clone-cheap-ops
