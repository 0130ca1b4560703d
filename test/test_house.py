"""The shape of the source: who may import whom inside each folder, one name for one thing, small functions and files."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from test_imports import FILES, ROOT, imports_of, module_of

from bactrian.passes.frame import registry

MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_FILE = 450

# What is in each folder, from the bottom to the top. What stands in one line may not import each other.
ORDER = {
    "passes": [
        ["frame"],
        ["machine"],
        ["network"],
        ["plan", "schedules"],
        ["ir"],
        ["spmd"],
        ["sharding"],
        ["stages"],
        ["pipelining"],
        ["peak"],
        ["contracts", *(target.partition(":")[0].rpartition(".")[2] for target in registry.PASSES.values())],
        ["pipelines"],
    ],
    "driver": [
        ["source", "progress", "gc_pause"],
        ["ranks"],
        ["planning"],
        ["xla"],
        ["arrays"],
        ["capture"],
        ["models"],
        ["report"],
        ["run"],
        ["launch"],
        ["profile"],
        ["planned_step"],
        ["traced_step"],
        ["api"],
        ["commands"],
        ["cli", "opt"],
    ],
}


def _parts(module: str) -> tuple[str, str]:
    """The folder of a module, and its file or folder directly in it: ``passes`` and ``ir`` of ``bactrian.passes.ir.x``."""
    names = module.split(".")
    return names[1], names[2] if len(names) > 2 else ""


def _imported_files() -> dict[str, set[str]]:
    """The modules of ours that every module imports, at its head or inside functions."""
    modules = {module_of(path) for path in FILES}
    return {module_of(path): {name for name, _ in imports_of(path) if name in modules} for path in FILES}


def _refuse_circles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_files_import_no_circle() -> None:
    _refuse_circles(_imported_files())


@pytest.mark.parametrize("folder", ["passes", "driver", "runtime"])
def test_folders_import_no_circle(folder: str) -> None:
    graph = defaultdict[str, set[str]](set)
    for module, imported in _imported_files().items():
        own = _parts(module)
        for other in map(_parts, imported):
            if own[0] == other[0] == folder and own[1] != other[1]:
                graph[own[1]].add(other[1])
    _refuse_circles(graph)


@pytest.mark.parametrize("folder", ORDER)
def test_nothing_imports_what_stands_above_it(folder: str) -> None:
    level = {name: number for number, names in enumerate(ORDER[folder]) for name in names}
    found = {_parts(module_of(path))[1] for path in FILES if path.relative_to(ROOT).parts[0] == folder} - {""}
    assert found <= level.keys(), "every file and folder has its place in ORDER"
    for module, imported in _imported_files().items():
        own = _parts(module)
        for name in imported:
            other = _parts(name)
            if own[0] == other[0] == folder and own[1] and other[1] and own[1] != other[1]:
                assert level[other[1]] < level[own[1]], f"{module} imports {name}, which stands above it"


def test_the_passes_are_the_files_beside_the_folders() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")}
    passes = {target.partition(":")[0].rpartition(".")[2] for target in registry.PASSES.values()}
    assert files == passes | {"__init__", "pipelines"}


def test_no_two_modules_share_a_name() -> None:
    places = defaultdict[str, list[str]](list)
    for path in FILES:
        places[module_of(path).rpartition(".")[2]].append(str(path.relative_to(ROOT)))
    assert [paths for paths in places.values() if len(paths) > 1] == []


def test_no_two_public_classes_share_a_name() -> None:
    places = defaultdict[str, list[str]](list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_are_small(path: Path) -> None:
    text = path.read_text()
    lengths = {
        f"{node.name} in line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}
