"""Which hosts a job has, and where they reach this one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bactrian.driver.launch.hosts import LOOPBACK, address_for, expand_node_list, hosts_of_job, is_this_host
from bactrian.passes.frame.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("a[1-3]", ["a1", "a2", "a3"]),
        ("a[08-10,21],gpu5", ["a08", "a09", "a10", "a21", "gpu5"]),
        ("r[1-2]n[1,4]-ib,x", ["r1n1-ib", "r1n4-ib", "r2n1-ib", "r2n4-ib", "x"]),
    ],
)
def test_lists_of_slurm(text: str, names: list[str]) -> None:
    assert expand_node_list(text) == names


@pytest.mark.parametrize(
    "variable", ["PBS_NODEFILE", "PE_HOSTFILE", "PRTE_MCA_prte_default_hostfile", "HYDRA_HOST_FILE"]
)
def test_files_of_hosts(tmp_path: Path, variable: str) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\nn0 slots=2\nn0\nn1:4\n\nme@n2 4 queue\n")
    assert hosts_of_job({variable: str(path)}) == ["n0", "n1", "n2"]
    with pytest.raises(ConfigError, match=f"no-hosts: No such file or directory\n  why: {variable} names it"):
        hosts_of_job({variable: str(tmp_path / "no-hosts")})


def test_hosts_of_slurm() -> None:
    assert hosts_of_job({"SLURM_JOB_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    assert hosts_of_job({}) == []


def test_this_host_is_known_by_name_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_this_host(socket.gethostname()) and is_this_host("localhost") and is_this_host(LOOPBACK)
    assert not is_this_host("no-such-host.invalid")
    assert not is_this_host("198.51.100.7")  # kept free for documents
    monkeypatch.setenv("SLURMD_NODENAME", "no-such-host.invalid")
    assert is_this_host("no-such-host.invalid")


def test_without_other_hosts_only_this_one_is_listened_to() -> None:
    assert address_for([]) == address_for([socket.gethostname(), "localhost"]) == LOOPBACK


def test_the_address_is_that_of_the_way_to_the_others() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.7", 9))
        except OSError:
            pytest.skip("this machine has no way to others")
        assert address_for([socket.gethostname(), "198.51.100.7"]) == probe.getsockname()[0]


def test_a_host_without_address() -> None:
    with pytest.raises(ConfigError, match="cannot start ranks on no-such-host"):
        address_for(["no-such-host.invalid"])
