"""The named pipelines: what they run, how the command runs them, and that nobody writes one down a second time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import bactrian
from bactrian.driver import opt
from bactrian.passes import pipelines
from bactrian.passes.frame import registry
from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.pipeline import pipeline_text, resolve, run_pipeline

ROOT = Path(__file__).resolve().parent.parent
GRAMMAR = {"test_pipeline.py", "test_opt.py"}  # whose subject is the text of pipelines
MODULE = "func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {\n  return %arg0 : tensor<f32>\n}\n"


def train(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step with one product."""
    loss, gradient = bactrian.value_and_grad(lambda w: jnp.square(jnp.tanh(batch @ w) @ w).mean())(state)
    return state - 0.1 * gradient, loss


@pytest.mark.parametrize("options", [{"num_stages": 2}, {"num_stages": 1, "mesh": "data=2"}], ids=str)
def test_the_planner_runs_the_whole_pipeline(options: dict[str, int | str]) -> None:
    traced = bactrian.parallelize(train, num_microbatches=2, **options).trace(jnp.ones((8, 8)), jnp.ones((4, 8)))
    module = traced.captured.module()
    run_pipeline(module, pipelines.stage_step(**options))
    assert str(module) == traced.plan().staged_text


def test_every_pass_but_the_search_and_the_counter_is_in_the_whole_pipeline() -> None:
    used = [step.name for step in pipelines.stage_step(mesh="data=2") if isinstance(step, Pass)]
    assert used == [name for name in registry.PASSES if name not in ("choose-pipeline", "count-collectives")]


@pytest.mark.parametrize("name", registry.PIPELINES)
def test_a_pipeline_is_a_flag_and_a_name_in_pipelines(name: str) -> None:
    steps = registry.load_pipeline(name)()
    assert pipeline_text(resolve(name)) == pipeline_text(resolve(steps)) == pipeline_text(steps)


def test_options_of_a_pipeline_reach_its_passes() -> None:
    found = resolve("cse,bactrian-form-stages{num-stages=2 mesh=data=2,model=4},cse")
    assert found == ["cse", *pipelines.form_stages(num_stages=2, mesh="data=2,model=4"), "cse"]
    assert resolve("bactrian-emit-stages{donate=false}") == list(pipelines.emit_stages(donate=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bactrian-form-stages{stages=2}", "pipeline bactrian-form-stages has no option 'stages'"),
        ("bactrian-form-stages{num-stages=two}", "option 'num-stages' of pipeline bactrian-form-stages needs int"),
        ("bactrian-form-stages{mesh=data}", "is not a list of axes"),
        ("bactrian-form-stage", "nearest: bactrian-form-stages"),
    ],
)
def test_wrong_pipelines_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(text)


def test_wrong_options_of_pass_objects_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="is not a list of axes"):
        resolve(pipelines.form_stages(mesh="data"))


def test_the_command_runs_and_lists_pipelines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.mlir"
    path.write_text(MODULE)
    assert opt.main([str(path), "--bactrian-prepare-function", "--cse"]) == 0
    with_flag = capfd.readouterr().out
    assert opt.main([str(path), "--pass-pipeline=builtin.module(bactrian-prepare-function,cse)"]) == 0
    assert capfd.readouterr().out == with_flag and "return %arg0" in with_flag
    assert opt.main(["--list-pipelines"]) == 0
    lines = capfd.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"--{name}" for name in registry.PIPELINES]
    assert all(len(line.split(maxsplit=1)[1]) <= 80 for line in lines)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file with their lines, docstrings left out; of an f-string its constant parts together."""
    tree = ast.parse(path.read_text())
    skipped = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            skipped.update(parts)
            yield node.lineno, "".join(str(part.value) for part in parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def test_no_pipeline_is_written_down_elsewhere() -> None:
    name = re.compile(rf"(?<![\w-])({'|'.join(registry.PASSES)})(?![\w-])")
    for folder in ("driver", "test", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in _texts(path) if path.name not in GRAMMAR else ():
                found = set(name.findall(text))
                assert len(found) < 2, f"{path.relative_to(ROOT)}:{line} writes a pipeline: use passes/pipelines.py"
