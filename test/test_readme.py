"""The README's two commands are the ones that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_exactly_two_commands() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block.splitlines() == ["python3 cmake/bootstrap.py run", "python3 cmake/bootstrap.py test"]
    assert "cmake/bootstrap.py test" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_bootstrap_explains_itself() -> None:
    command = [sys.executable, str(ROOT / "cmake" / "bootstrap.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "bootstrap.py test" in done.stderr
