"""What the documentation names is there: files, modules, attributes, passes; decisions are numbered and have a status."""

from __future__ import annotations

import doctest
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import bactrian
from bactrian.passes import pipelines
from bactrian.passes.schedules.schedule import Schedule, StageOrder

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = "passes|driver|runtime|test|lit_tests|cmake|examples|benchmarks|docs"

# What other projects call things.
FOREIGN = {"CUDA_VISIBLE_DEVICES", "model_builder", "no_sync", "xla_cpu_scheduler_type"}


def code_spans(page: Path) -> Iterator[str]:
    """What stands in backticks, outside of blocks."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    named = [span for span in code_spans(page) if re.match(rf"({FOLDERS})/[\w./-]*$", span)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_exist(page: Path) -> None:
    named = {name for span in code_spans(page) for name in re.findall(r"\bbactrian(?:\.\w+)+", span)}
    sources = "".join(path.read_text() for folder in ("passes", "driver") for path in (ROOT / folder).rglob("*.py"))
    missing = [name for name in sorted(named) if not _is_python(name) and f'"{name}"' not in sources]
    assert missing == [], "neither Python names nor attributes of the IR"


@pytest.fixture(scope="module")
def identifiers() -> set[str]:
    """All names in the sources, and the names of the files."""
    folders = ["passes", "driver", "runtime", "bactrian", "test", "benchmarks", "examples", "cmake"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path.stem for path in files} | {
        name for path in files for name in re.findall(r"[A-Za-z_]\w*", path.read_text())
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_identifiers_exist(page: Path, identifiers: set[str]) -> None:
    words = {word for span in code_spans(page) for word in re.findall(r"[A-Za-z_]\w*", span)}
    named = {word for word in words if "_" in word or re.search(r"[a-z][A-Z]", word)}
    assert sorted(named - identifiers - FOREIGN) == []


def _is_python(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_is_at_most_120_columns_wide(page: Path) -> None:
    if page.name == "passes.md":
        return  # made of docstrings, with IR in them
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_picture_has_every_pass() -> None:
    shown = re.findall(r'class="m"[^>]*>([a-z]+(?:-[a-z]+)*)<', (ROOT / "docs" / "pipeline.svg").read_text())
    assert shown == [step.name for step in pipelines.stage_step(mesh="data=2") if not isinstance(step, str)]


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in bactrian.__all__ if not re.search(rf":: (bactrian\.)?{name}\n", page)] == []


def test_decisions_are_numbered_and_have_a_status() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for number, page in enumerate(pages, 1):
        title, _, status = page.read_text().splitlines()[:3]
        assert title.startswith(f"# {number}. "), page.name
        assert re.match(r"Status: (kept|superseded by \[)", status), page.name


def test_the_example_of_a_schedule_is_one() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "writing-schedules.md").read_text(), re.DOTALL)
    names = {"Schedule": Schedule, "StageOrder": StageOrder, "ClassVar": ClassVar}
    exec(textwrap.dedent(program), names)
    found = doctest.DocTestFinder().find(names["Sequential"], "Sequential", globs=names)
    (done,) = [doctest.DocTestRunner().run(each) for each in found if each.examples]
    assert (done.attempted, done.failed) == (1, 0)
