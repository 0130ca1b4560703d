"""The hosts of a job, as its scheduler's variables name them, and the address at which they reach this one."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from bactrian.passes.frame.errors import ConfigError

LOOPBACK = "127.0.0.1"

# Files with a host per line, first its name: of PBS, LSF, Grid Engine, Open MPI and MPICH.
_HOST_FILES = (
    "PBS_NODEFILE",
    "LSB_DJOB_HOSTFILE",
    "PE_HOSTFILE",
    "PRTE_MCA_prte_default_hostfile",
    "OMPI_MCA_orte_default_hostfile",
    "HYDRA_HOST_FILE",
)


def hosts_of_job(environment: Mapping[str, str] | None = None) -> list[str]:
    """The hosts that mpirun will use, each once; none where nothing names them, and mpirun uses this one.

    Raises:
        ConfigError: a variable names a file that can't be read.
    """
    environment = os.environ if environment is None else environment
    hosts = expand_node_list(environment.get("SLURM_JOB_NODELIST", ""))
    for variable in _HOST_FILES:
        if path := environment.get(variable):
            hosts += _read_hosts(path, variable)
    return list(dict.fromkeys(hosts))


def _read_hosts(path: str, variable: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read the hosts of the job: {path}: {error.strerror}", why=f"{variable} names it"
        ) from None
    words = [line.split("#")[0].split() for line in lines]
    return [line[0].partition(":")[0].rpartition("@")[2] for line in words if line]


def expand_node_list(text: str) -> list[str]:
    """The names in a list as Slurm writes it: ``a[1-2,07],login`` is a1, a2, a07 and login."""
    names = list[str]()
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        begun = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            ends = [literal] if literal else [number for part in ranges.split(",") for number in _numbers(part)]
            begun = [start + end for start in begun for end in ends]
        names += begun
    return names


def _numbers(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]


def is_this_host(name: str) -> bool:
    """Whether a name, or an address, is this host's. Slurm may have a name of its own for it."""
    own = socket.gethostname().partition(".")[0], os.environ.get("SLURMD_NODENAME", "")
    if name.partition(".")[0] == own[0] or name == own[1]:
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)  # only an own address can be taken
    except OSError:
        return False
    return True


def address_for(hosts: list[str]) -> str:
    """The address at which those hosts reach this one: that of the interface towards the first other one.

    Raises:
        ConfigError: that one's name has no address, or there is no way to it.
    """
    other = next((host for host in hosts if not is_this_host(host)), None)
    if other is None:
        return LOOPBACK
    try:
        family, kind, _, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot start ranks on {other}: this host finds no way there",
            why=str(error),
            fix=f"give {other} an address that {socket.gethostname()} knows, by DNS or in /etc/hosts",
        ) from None
