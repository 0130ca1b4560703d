"""Options of the test runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from clusters import SLOW
from xla_flags import DEVICES, QUICK

for flag in (DEVICES, *QUICK):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of the tests too")
    parser.addoption("--part", default="1/1", metavar="I/N", help="only the I-th of N parts, for several processes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi: starts mpirun")
    config.addinivalue_line("markers", "long: runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long form: pass --long"))
        if item.get_closest_marker("mpi") and shutil.which("mpirun") is None:
            item.add_marker(pytest.mark.skip(reason="mpirun is not on the path"))
    part, parts = map(int, config.getoption("--part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part {part}/{parts}: the first number goes from 1 to the second")
    start, end = len(items) * (part - 1) // parts, len(items) * part // parts
    config.hook.pytest_deselected(items=items[:start] + items[end:])
    items[:] = items[start:end]


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a cluster on which everything is worth cutting."""
    path = tmp_path_factory.mktemp("cluster") / "slow.toml"
    path.write_text(SLOW)
    return path
