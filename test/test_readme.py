"""What the README shows is what happens: its commands, its program and its plan."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import bactrian

ROOT = Path(__file__).resolve().parent.parent


def test_exactly_two_commands() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block.splitlines() == ["python3 cmake/bootstrap.py run", "python3 cmake/bootstrap.py test"]
    assert "cmake/bootstrap.py test" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_bootstrap_explains_itself() -> None:
    command = [sys.executable, str(ROOT / "cmake" / "bootstrap.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "bootstrap.py test" in done.stderr


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's program as a file."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path_factory.mktemp("readme") / "train.py"
    script.write_text(program)
    return script


def printed(*words: str, cwd: Path) -> str:
    """What a command prints."""
    done = bactrian(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_learns(train: Path) -> None:
    lines = printed("run", "train.py", cwd=train.parent).splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 20 and losses[-1] < 0.01 * losses[0]


@pytest.mark.mpi
def test_the_program_learns_on_two_ranks(train: Path) -> None:
    lines = printed("run", "-n", "2", "train.py", cwd=train.parent).splitlines()
    assert sum("loss" in line for line in lines) == 20


def _comparable(table: str, exact: bool) -> list[str]:
    """The lines without the program's fingerprint, or (not exact) what was decided and the head of the table."""
    lines = [line.rstrip() for line in table.strip().splitlines()[1:]]
    return lines if exact else [lines[0], lines[3].replace(" ", "")]


def test_the_plan_is_the_one_shown_in_any_folder(train: Path) -> None:
    saved = list[bytes]()
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exact = jax.__version__.startswith("0.10.")  # of another jax the figures differ a little
    for name in ("here", "there"):
        folder = train.parent / name
        folder.mkdir()
        (folder / "train.py").write_text(train.read_text())
        table = printed("plan", "train.py:train_step", "--save", "plan", cwd=folder)
        assert _comparable(table, exact) == _comparable(shown, exact)
        saved.append((folder / "plan" / "plan.json").read_bytes() + (folder / "plan" / "staged.mlir").read_bytes())
    assert saved[0] == saved[1] and b"at train.py:" in saved[0]
