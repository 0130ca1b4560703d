"""Options of the test runs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from clusters import SLOW
from xla_flags import DEVICES, QUICK

from bactrian.passes.frame.pipeline import verify_contracts_by_default

for flag in (DEVICES, *QUICK):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


# A shell's background jobs ignore it, and would pass that on to all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of the tests too")


def pytest_configure() -> None:
    verify_contracts_by_default()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("mpi") and shutil.which("mpirun") is None:
            item.add_marker(pytest.mark.skip(reason="mpirun is not on the path"))
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a cluster on which everything is worth cutting."""
    path = tmp_path_factory.mktemp("cluster") / "slow.toml"
    path.write_text(SLOW)
    return path
