"""One pass = one file = one flag = one pair of lit files = one entry of docs/passes.md."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

from bactrian.passes.frame import documentation, registry
from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", registry.PASSES)
def test_each_pass_has_its_file_class_and_lit_files(name: str) -> None:
    module, _, class_name = registry.PASSES[name].partition(":")
    assert module == f"bactrian.passes.{name.replace('-', '_')}"
    assert class_name == "".join(word.capitalize() for word in name.split("-"))
    cls = registry.load(name)
    assert cls.__module__ == module and cls.__name__ == class_name
    for file in (f"{name}.mlir", f"{name}-invalid.mlir"):
        assert (ROOT / "lit_tests" / file).is_file(), f"lit_tests/{file} is missing"
    flag = re.compile(rf"--{name}\b|\b{name}\b")
    assert flag.search((ROOT / "lit_tests" / f"{name}.mlir").read_text().splitlines()[0])
    negative = (ROOT / "lit_tests" / f"{name}-invalid.mlir").read_text()
    assert "--verify-diagnostics" in negative and "expected-error" in negative
    assert "expected-error@unknown" not in negative, "an error stands at an op: raise it with error_at or ctx.error"


@pytest.mark.parametrize("name", registry.PASSES)
def test_each_pass_is_a_documented_frozen_dataclass(name: str) -> None:
    cls = registry.load(name)
    assert issubclass(cls, Pass) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.summary[:1].islower() and len(cls.summary) <= 80 and not cls.summary.endswith(".")
    text = inspect.getdoc(cls) or ""
    assert "Requires:" in text and "Ensures:" in text
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), f"option {field.name} of {name} has no help text"
        assert field.default is not dataclasses.MISSING, f"option {field.name} of {name} has no default"
    for statistic in cls.statistics:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", statistic.name) and statistic.help


def test_the_files_of_the_folder_are_the_passes() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")}
    assert files == {name.replace("-", "_") for name in registry.PASSES} | {"__init__", "pipelines"}


@pytest.mark.parametrize("name", registry.PASSES)
def test_each_example_has_an_input_and_an_output(name: str) -> None:
    text = inspect.getdoc(registry.load(name)) or ""
    order = [text.index(word) for word in ("Requires:", "Ensures:", "\nInput:\n", "\nOutput:\n")]
    assert order == sorted(order)


def test_every_class_that_is_a_pass_is_registered() -> None:
    for path in sorted((ROOT / "passes").glob("*.py")):
        if re.search(r"^class \w+\(Pass\):", path.read_text(), re.MULTILINE):
            assert path.stem.replace("_", "-") in registry.PASSES, f"{path.name} defines a pass that has no flag"


def test_at_least_a_fifth_of_the_lit_files_are_negative() -> None:
    files = sorted((ROOT / "lit_tests").glob("*.mlir"))
    assert sum("-invalid" in file.name for file in files) >= 0.2 * len(files)


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "passes.md").read_text() == documentation.markdown(), (
        "docs/passes.md is stale: bactrian-opt --list-passes=markdown > docs/passes.md"
    )


def test_other_distributions_can_add_passes(monkeypatch) -> None:
    points = [
        importlib.metadata.EntryPoint("other-pass", "bactrian.passes.flatten_calls:FlattenCalls", "bactrian.passes"),
        importlib.metadata.EntryPoint("lost-pass", "no_such_module:Pass", "bactrian.passes"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    registry._third_party.cache_clear()
    try:
        assert registry.names()[-2:] == ["lost-pass", "other-pass"]
        with pytest.raises(ConfigError, match="is not a pass named 'other-pass'"):
            registry.load("other-pass")
        with pytest.raises(ConfigError, match="cannot load pass 'lost-pass'"):
            registry.load("lost-pass")
        assert "cannot load pass 'lost-pass'" in documentation.help_text()
    finally:
        registry._third_party.cache_clear()
