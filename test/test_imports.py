"""Who may import whom (the folders' contract), read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bactrian.passes.frame import registry

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("passes", "driver", "runtime")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MLIR = {"jaxlib"}
SOLVERS = {"ortools"}
FORBIDDEN = {
    "passes": {"jax", "mpi4py", "cupy", "flax", "optax", "equinox", "bactrian.driver", "bactrian.runtime"},
    "runtime": {"bactrian.driver", "jaxlib.mlir", "flax", "optax", "equinox"},
    "driver": {"flax", "optax", "equinox"},
}


def module_of(path: Path) -> str:
    parts = ("bactrian", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, absolute, with its line."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def _touches(module: str, roots: set[str]) -> bool:
    """Whether a module of the compiler imports one of ``roots``, itself or through our other modules."""
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        path = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name in seen or not path.is_file():  # a name in a module, or a package, whose __init__ is lazy
            continue
        seen.add(name)
        imported = [found for found, _ in imports_of(path)]
        if any(_inside(found, roots) for found in imported):
            return True
        todo += [found for found in imported if _inside(found, {"bactrian"})]
    return False


def _inside(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_import_only_what_they_may(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    passes = {target.partition(":")[0] for target in registry.PASSES.values()}
    for name, line in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert not _inside(name, FORBIDDEN[folder]), where
        if folder == "passes":
            may = {module_of(path)} if path.name != "pipelines.py" else passes
            assert not _inside(name, passes - may), f"{where}: no pass imports another pass"
        if folder == "runtime" and _inside(name, {"bactrian.passes"}):
            assert not _touches(name, MLIR | SOLVERS), f"{where}: runtime uses only the compiler's plain data"


def test_of_the_files_of_pipelining_only_the_reader_of_layers_imports_mlir() -> None:
    files = (ROOT / "passes" / "pipelining").glob("*.py")
    assert {path.stem for path in files if _touches(module_of(path), MLIR)} <= {"layer_programs"}


def test_only_one_module_spells_the_names_of_our_attributes() -> None:
    defining = ROOT / "passes" / "ir" / "attributes.py"
    names = {
        node.value
        for node in ast.walk(ast.parse(defining.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("bactrian.")
    }
    assert len(names) > 20
    for path in set(FILES) - {defining}:
        for node in ast.walk(ast.parse(path.read_text())):
            literal = node.value if isinstance(node, ast.Constant) else None
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            assert literal not in names, f"{where} spells {literal!r}: import it from passes/ir/attributes.py"


@pytest.mark.parametrize("package", ["", ".passes", ".driver", ".runtime", ".passes.frame"])
def test_packages_are_lazy(package: str) -> None:
    program = f"import sys, bactrian{package}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"jax", "jaxlib", "numpy", "mpi4py", "ortools", "rich"} & set(done.stdout.split())
