"""What it takes to send a value from one mesh to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec


@dataclass(frozen=True)
class MeshTransfer:
    """A message from one mesh to another.

    Attributes:
        seconds: its links carry it for so long.
        latency: after that, until it is there.
        links: that it needs, each of which carries one message at a time: within a host from one mesh to the other
            (``0 to 4``, by their first devices), between hosts out of each host of the one, and into each of the other.
    """

    seconds: float
    latency: float
    links: tuple[str, ...]


def enough_hosts(cluster: Cluster, counts: Sequence[int]) -> Cluster:
    """The cluster, with as many hosts as stages of so many devices need, where all hosts are equal."""
    first, *others = cluster.groups
    if others:
        return cluster
    most = sum(-(-count // first.devices_per_host) for count in counts)
    return replace(cluster, groups=(replace(first, hosts=max(first.hosts, most)),))


def stage_devices(cluster: Cluster, counts: Sequence[int], firsts: Sequence[int] | None = None) -> tuple[range, ...]:
    """The devices of each stage's mesh on the line of a cluster.

    Args:
        cluster: the hosts.
        counts: the devices of each stage.
        firsts: the first device of each, if that is decided; else stages lie along the line.

    Raises:
        ConfigError: the cluster has no place for them.
    """
    placed = cluster.places(counts) if firsts is None else firsts
    return tuple(range(first, first + count) for first, count in zip(placed, counts, strict=True))


def mesh_transfer(cluster: Cluster, sender: range, receiver: range, nbytes: float) -> MeshTransfer:
    """How long each element of a value takes that crosses once from one mesh to another.

    Within a host, as many devices send at once as the smaller mesh has. Between hosts, as many hosts do, and each sends
    and receives one message at a time.

    Example: 1 GB from 4 devices to 2 of another host, at 12.5 GB/s between hosts, takes 0.08 s.
    """
    latency, rate = cluster.link(sender[0], receiver[0])
    at_once = min(len(sender), len(receiver))
    hosts = [sorted({cluster.host_of(devices[0]), cluster.host_of(devices[-1])}) for devices in (sender, receiver)]
    if hosts[0] == hosts[1] and len(hosts[0]) == 1:
        return MeshTransfer(nbytes / (at_once * rate), latency, (f"{sender[0]} to {receiver[0]}",))
    spans = [range(ends[0], ends[-1] + 1) for ends in hosts]
    within = min(cluster.group_of(devices[0]).intra_host_bytes_per_second for devices in (sender, receiver))
    seconds = nbytes / min(min(map(len, spans)) * rate, at_once * within)
    links = *(f"out of host {host}" for host in spans[0]), *(f"into host {host}" for host in spans[1])
    return MeshTransfer(seconds, latency, links)


def replication_seconds(mesh: Mesh, spec: Spec, nbytes: float) -> float:
    """Until all devices of a mesh have what they need of a value of which each element has arrived once.

    Devices that need the same shard have equal parts of it, and gather them along one axis after the other, the fastest
    first.
    """
    axes = [axis for axis in mesh.axes if axis.size > 1 and axis.name not in spec.axes]
    held, seconds = nbytes / mesh.num_devices, 0.0
    for axis in sorted(axes, key=lambda axis: axis.seconds_per_byte):
        seconds += axis.all_gather(held)
        held *= axis.size
    return seconds
