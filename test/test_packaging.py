"""What is installed: the same files from a wheel, a source distribution and a checkout without links; and that they work.

The long form builds with the newest setuptools, in a virtual environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from bactrian.passes.frame import registry

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("passes", "driver", "runtime")
TESTED = (
    "test",
    "lit_tests",
    "cmake",
    "docs",
    "examples",
    "benchmarks",
)  # what the tests of a source distribution need
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "build", "dist", "shared", "*.egg-info", "__pycache__", ".*_cache")

STEP = """
import bactrian, jax.numpy as jnp, numpy as np

@bactrian.parallelize(num_stages=1, num_microbatches=2)
def step(w, x):
    loss, gradient = bactrian.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - gradient, loss

w, loss = step(np.ones((4, 4), np.float32), np.ones((8, 4), np.float32))
assert float(loss) == 16.0 and bactrian.gather(w).shape == (4, 4)
print(bactrian.__file__)
"""


def expected_modules() -> set[str]:
    """Every module of a wheel, by its path there."""
    modules = {f"bactrian/{path.relative_to(ROOT)}" for folder in MAPPED for path in (ROOT / folder).rglob("*.py")}
    return modules | {"bactrian/__init__.py"}


def expected_data() -> set[str]:
    """Every other file of a wheel."""
    templates = {f"bactrian/{path.relative_to(ROOT)}" for path in (ROOT / "driver/report/templates").iterdir()}
    return templates | {"bactrian/py.typed"}


def test_every_folder_of_the_source_is_a_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {str(Path(path).parent).replace("/", ".") for path in expected_modules()}
    assert settings["package-dir"] == {f"bactrian.{folder}": folder for folder in MAPPED}


def test_the_source_has_no_links() -> None:
    folders = ("bactrian", *MAPPED, *TESTED)
    assert [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_symlink()] == []


def test_a_checkout_that_is_not_installed_says_what_to_do() -> None:
    """As `python -c "import bactrian; bactrian.parallelize"` in the checkout does; -S hides what is installed."""
    command = [sys.executable, "-S", "-c", "import bactrian; print(bactrian.__version__); bactrian.parallelize"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout  # the version is known
    assert "not installed; run `pip install --editable .` in it" in done.stderr


@dataclass
class Builds:
    """What was built.

    Attributes:
        wheel: of a checkout without links.
        sdist: the unpacked source distribution of it.
        wheel_of_sdist: built from that.
    """

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    folder = tmp_path_factory.mktemp("builds")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "setuptools>=77"], check=True)

    def build(source: Path, kind: str) -> Path:
        program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
        done = subprocess.run([python, "-c", program], cwd=source, capture_output=True, text=True, check=True)
        return folder / done.stdout.split()[-1]

    shutil.copytree(ROOT, folder / "copied", ignore=NOT_SOURCE, symlinks=True)
    shutil.make_archive(str(folder / "checkout"), "zip", folder / "copied")  # no links, no permissions
    shutil.unpack_archive(folder / "checkout.zip", folder / "checkout")
    wheel = build(folder / "checkout", "wheel")
    wheel = wheel.rename(folder / "copied" / wheel.name)
    with tarfile.open(build(folder / "checkout", "sdist")) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (sdist,) = (folder / "sdist").iterdir()
    return Builds(wheel, sdist, build(sdist, "wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel that are installed as they are."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("bactrian/")}


@pytest.mark.long
def test_a_wheel_has_every_module_and_no_other_file(builds: Builds) -> None:
    assert contents(builds.wheel).keys() == expected_modules() | expected_data()
    for name, content in contents(builds.wheel).items():
        path = ROOT / name if (ROOT / name).exists() else ROOT / name.removeprefix("bactrian/")
        assert content == path.read_bytes()


@pytest.mark.long
def test_a_source_distribution_makes_the_same_wheel(builds: Builds) -> None:
    assert contents(builds.wheel_of_sdist) == contents(builds.wheel)


@pytest.mark.long
def test_a_source_distribution_has_what_its_tests_need(builds: Builds) -> None:
    copied = builds.wheel.parent
    wanted = {path.relative_to(copied) for name in TESTED for path in (copied / name).rglob("*") if path.is_file()}
    wanted |= {Path(name) for name in ("CMakeLists.txt", "CHANGELOG.md", "README.md", "pyproject.toml", ".ci/run")}
    assert wanted <= {path.relative_to(builds.sdist) for path in builds.sdist.rglob("*")}


@pytest.fixture(scope="module")
def installed(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, which come before what is installed in this environment."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(builds.wheel) as archive:
        archive.extractall(site)
    return site


def run_there(site: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_a_step_runs_from_the_wheel(installed: Path) -> None:
    (installed.parent / "one_step.py").write_text(STEP)
    assert run_there(installed, sys.executable, "one_step.py").strip() == str(installed / "bactrian" / "__init__.py")


@pytest.mark.long
def test_the_wheel_lists_all_passes(builds: Builds, installed: Path) -> None:
    listed = json.loads(run_there(installed, sys.executable, "-m", "bactrian.driver.opt", "--list-passes=json"))
    assert registry.PASSES.keys() <= {entry["name"] for entry in listed}
    with zipfile.ZipFile(builds.wheel) as archive:
        (points,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "bactrian-opt = bactrian.driver.opt:main" in points and "bactrian = bactrian.driver.cli:main" in points


@pytest.mark.long
def test_a_type_checker_knows_the_public_types(installed: Path) -> None:
    program = installed.parent / "typed" / "program.py"
    program.parent.mkdir()
    program.write_text("import bactrian\nreveal_type(bactrian.parallelize)\nreveal_type(bactrian.Plan.load)\n")
    (program.parent / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(installed)]}))
    told = run_there(installed, "pyright", "--pythonpath", sys.executable, "--project", str(program.parent))
    (parallelize,) = re.findall(r'Type of "bactrian.parallelize" is "(.*)"', told)
    assert parallelize.startswith("Overload[(fun: (...) -> Any, *, num_stages: int | Literal['auto'] | None = None")
    assert parallelize.endswith("-> Parallelized)]") and "Unknown" not in told
    assert 'Type of "bactrian.Plan.load" is "(directory: str | Path) -> Plan"' in told
