"""docs/worked-program.md shows what the passes make of its program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest
from jaxlib.mlir import ir

from bactrian.passes import pipelines
from bactrian.passes.frame.pipeline import run_pipeline

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "worked-program.md").read_text()
SHOWN = re.findall(r"<!-- ([\w-]+) -->\n```mlir\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.skipif(
    not jax.__version__.startswith("0.10."), reason="the page shows what jax 0.10 lowers the program to"
)


def block_of(language: str) -> str:
    """The page's first block in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's program, traced, and beside it the cluster file."""
    cluster = tmp_path_factory.mktemp("worked") / "cluster.toml"
    cluster.write_text(block_of("toml"))
    names: dict[str, Any] = {}
    exec(block_of("python").replace("cluster.toml", str(cluster)), names)
    return names["train_step"].trace(*names["example_args"]), cluster


@pytest.fixture(scope="module")
def texts(traced: Any) -> dict[str, str]:
    """The module as text after each pass, without white space."""
    step, cluster = traced
    module = step.captured.module(None)
    found = {"captured": _dense(module)}
    for each in pipelines.stage_step(num_stages=2, mesh="data=2", cluster=str(cluster)):
        run_pipeline(module, [each])
        name = each if isinstance(each, str) else each.name
        found[name.removeprefix("func.func(").removesuffix(")")] = _dense(module)
    return found


def _dense(text: ir.Module | str) -> str:
    return "".join(str(text).split())


@pytest.mark.parametrize(("name", "shown"), SHOWN, ids=[name for name, _ in SHOWN])
def test_the_ir_is_what_the_pass_leaves(texts: dict[str, str], name: str, shown: str) -> None:
    rest = texts[name]
    for chunk in filter(None, map(_dense, shown.split("..."))):
        _, found, rest = rest.partition(chunk)
        assert found, f"after {name} there is no (more)\n  {chunk}\nin\n{rest or texts[name]}"


def test_every_pass_has_its_place(texts: dict[str, str]) -> None:
    headings = " ".join(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
    missing = [name for name in texts if name not in headings and f"`{name}`" not in PAGE]
    assert missing == ["captured"]


def test_the_plan_is_the_one_shown(traced: Any) -> None:
    plan = str(traced[0].plan().plan).splitlines()
    assert block_of("text").splitlines() == plan[1:3]
