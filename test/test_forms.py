"""What passes rely on: a module from outside that lacks it is refused at the op, by ``bactrian-opt``, with exit code 3."""

from __future__ import annotations

from pathlib import Path

import pytest

from bactrian.driver import opt
from bactrian.passes.frame import registry

CAPTURED = """module attributes {bactrian.num_microbatches = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.multiply %w, %x : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}
"""
PLACED = """module attributes {bactrian.num_layers = 1 : i64, bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.multiply %w, %x {bactrian.layer = 0 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config = {kinds = "gradient", reductions = "sum"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b {bactrian.layer = 0 : i64, bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}
"""
STAGED = """module attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.argument = 0 : i64, bactrian.role = "batch"}) -> (!mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.result = 0 : i64}) attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"other" : <["data"=1]>>>} {
    %y = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @stage0.forward(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    return %y : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
  }
  func.func private @stage0.forward(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
}
"""
MODULES = {"captured": CAPTURED, "placed": PLACED, "staged": STAGED}

# (contract, module, pass, what is changed, what takes its place, line, message)
LACKING = [
    ("formed", "captured", "flatten-calls", "microbatches = 2", "microbatches = 65537", 1, "from 1 to 65536 (i64)"),
    ("formed", "captured", "flatten-calls", "= 2 : i64", "= 2 : i32", 1, "bactrian.num_microbatches is 2 : i32, must be an"),
    ("formed", "captured", "flatten-calls", "bactrian.role = ", "bactrian.roll = ", 2, "did you mean bactrian.role?"),
    ("formed", "captured", "flatten-calls", "bactrian.updates = 0", "bactrian.updates = 2", 2, "number of one of 2 arguments"),
    ("formed", "captured", "flatten-calls", '"batch"}', '"batch", bactrian.stage_shardings = {stage0 = #sdy.sharding<@stage1, [{}, {}]>}}', 2, "a sharding over each mesh by its name"),
    ("formed", "placed", "split-stages", "stage = 0", "stage = 1", 3, "must be the number of one of 1 stages"),
    ("formed", "placed", "assign-stages", 'phase = "backward"', 'role = "batch"', 3, "an op has bactrian.role, which stands on an argument"),
    ("formed", "placed", "split-stages", 'phase = "backward"', "phase = 3 : i64", 3, "bactrian.phase is 3 : i64, must be one of prepare, "),
    ("typed", "captured", "infer-phases", '"batch"})', '"batch"}, %z: tensor<?xf32> {bactrian.role = "batch"})', 2, "is dynamic, must be static"),
    ("typed", "captured", "infer-phases", '"batch"})', '"batch"}, %z: tensor<*xf32> {bactrian.role = "batch"})', 2, "must be a tensor of known shape"),
    ("typed", "captured", "infer-phases", '"batch"})', '"batch"}, %z: tensor<2305843009213693952xf32> {bactrian.role = "batch"})', 2, "at most 2^48 bytes"),
    ("typed", "captured", "infer-phases", '"batch"})', '"batch"}, %z: tensor<4xindex> {bactrian.role = "batch"})', 2, "must be integers, floats"),
    ("marked", "captured", "infer-phases", '"state"', '"weight"', 2, "bactrian.role is 'weight', must be one of state, batch"),
    ("marked", "captured", "infer-phases", '"mean"', '"mean,mean"', 4, "1 operands, 1 results and 2 reductions"),
    ("marked", "captured", "infer-phases", '"mean"', '"median"', 4, "reductions of the gradient boundary has 'median'"),
    ("marked", "captured", "infer-phases", "gradient_boundary", "boundary", 4, "there is no custom call @bactrian.boundary"),
    ("with-boundary", "captured", "infer-phases", "bactrian.gradient_boundary", "identity", 2, "@main has no gradient boundary"),
    ("with-phases", "placed", "group-layers", 'bactrian.phase = "backward", ', "", 3, "bactrian.phase is missing on"),
    ("with-layers", "placed", "assign-stages", "bactrian.layer = 0 : i64, ", "", 3, "bactrian.layer is missing on"),
    ("with-stages", "placed", "split-stages", ", bactrian.stage = 0 : i64", "", 3, "bactrian.stage is missing on"),
    ("with-num-stages", "placed", "select-residuals", "bactrian.num_stages = 1 : i64, ", "", 1, "bactrian.num_stages is missing"),
    ("with-num-microbatches", "placed", "accumulate-gradients", "bactrian.num_microbatches = 2 : i64, ", "", 1, "start from"),
    ("called", "staged", "schedule-microbatches", "stage = 0 : i64", "phases = 0 : i64", 3, "bactrian.phases"),
    ("called", "staged", "schedule-microbatches", ", bactrian.stage = 0 : i64", "", 3, "bactrian.stage is missing on mpmd.fragment_call"),
    ("called", "staged", "schedule-microbatches", '"batch"})', '"batch"}, %z: !mpmd.mesh_tensor<"other", tensor<4xf32>>)', 2, 'must be a tensor on the mesh "stage<number>"'),
]  # fmt: skip


@pytest.mark.parametrize(("contract", "module", "flag", "old", "new", "line", "message"), LACKING)
def test_a_module_that_lacks_what_a_pass_relies_on(
    contract: str,
    module: str,
    flag: str,
    old: str,
    new: str,
    line: int,
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert contract in registry.load(flag).requires
    text = MODULES[module]
    assert old in text
    path = tmp_path / "in.mlir"
    path.write_text(text.replace(old, new, 1))
    assert opt.main([str(path), f"--{flag}", f"--reproducer-dir={tmp_path}"]) == 3
    err = capfd.readouterr().err
    assert f"{path}:{line}:" in err and f"error: cannot run {flag}: " in err and message in err


def test_modules_that_lack_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.mlir"
    for module, flags in {
        "captured": ["flatten-calls", "infer-phases"],
        "placed": ["group-layers=num-layers=0", "assign-stages", "select-residuals", "accumulate-gradients"],
        "staged": ["schedule-microbatches"],
    }.items():
        path.write_text(MODULES[module])
        assert opt.main([str(path), *(f"--{flag}" for flag in flags)]) == 0, capfd.readouterr().err


def test_every_pass_says_what_it_relies_on() -> None:
    passes = [registry.load(flag) for flag in registry.PASSES]
    required = {name for each in passes for name in each.requires}
    ensured = {name for each in passes for name in each.ensures}
    assert required | ensured == set(registry.CONTRACTS)
    assert required - ensured == {contract for contract, *_ in LACKING}
    assert all("formed" in each.requires for each in passes)
