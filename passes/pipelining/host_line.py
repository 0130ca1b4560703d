"""The devices of a cluster as a line of hosts, on which stages stand one behind the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from bactrian.passes.machine.cluster import Cluster

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class HostLink:
    """Seconds of the smallest message, and bytes per second."""

    latency: float
    bytes_per_second: float


@dataclass(frozen=True)
class HostKind:
    """Hosts that are alike.

    Attributes:
        num_devices: of one host.
        memory_bytes: of one device.
        intra_host: from one device to another of its host.
        inter_host: from one host to another; its devices share it.
        call_seconds: what a call of a stage function takes beside its work.
    """

    num_devices: int
    memory_bytes: float
    intra_host: HostLink
    inter_host: HostLink
    call_seconds: float = 0.0


@dataclass(frozen=True)
class Submesh:
    """So many devices beside each other, of hosts of one kind: part of one host, or one or more whole hosts."""

    num_devices: int
    kind: int


@dataclass(frozen=True)
class HostLine:
    """Hosts in a row. Devices are numbered along it, from 0.

    Attributes:
        kinds: of hosts.
        hosts: the kind of each host, along the line.
    """

    kinds: tuple[HostKind, ...]
    hosts: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster) -> HostLine:
        """The hosts of a cluster, in its order."""
        kinds = [
            HostKind(
                group.devices_per_host,
                group.memory_bytes,
                HostLink(group.intra_host_latency, group.intra_host_bytes_per_second),
                HostLink(group.inter_host_latency, group.inter_host_bytes_per_second),
                group.call_seconds,
            )
            for group in cluster.groups
        ]
        return cls(tuple(kinds), tuple(kind for kind, group in enumerate(cluster.groups) for _ in range(group.hosts)))

    @cached_property
    def first_devices(self) -> tuple[int, ...]:
        """The first device of each host."""
        return tuple(accumulate((self.kinds[kind].num_devices for kind in self.hosts[:-1]), initial=0))

    @cached_property
    def num_devices(self) -> int:
        """All of them."""
        return sum(self.kinds[kind].num_devices for kind in self.hosts)

    def host_of(self, device: int) -> int:
        """The host that a device is of."""
        return bisect_right(self.first_devices, device) - 1

    def num_hosts(self, submesh: Submesh) -> int:
        """Hosts that a submesh lies on."""
        return max(1, submesh.num_devices // self.kinds[submesh.kind].num_devices)

    def places(self, submesh: Submesh) -> Iterator[int]:
        """Where a submesh may begin: within a host, or at the first device of the first of several hosts."""
        per_host = self.kinds[submesh.kind].num_devices
        hosts, left_over = divmod(submesh.num_devices, per_host)
        for number, (first, kind) in enumerate(zip(self.first_devices, self.hosts, strict=True)):
            if kind != submesh.kind:
                continue
            if submesh.num_devices <= per_host:
                yield from range(first, first + per_host - submesh.num_devices + 1)
            elif not left_over and self.hosts[number : number + hosts] == (kind,) * hosts:
                yield first

    def round_trip(self, nbytes: Floats, sender: Submesh, receiver: Submesh, *, in_host: bool) -> Floats:
        """Seconds of what a microbatch sends from one stage to the next and back.

        Within a host as many devices send at once as the smaller of the two has, between hosts as many hosts.

        Args:
            nbytes: forward and backward together; where nothing is sent, nothing is waited for.
            sender, receiver: the stages.
            in_host: whether they are on one host.
        """
        if in_host:
            link = self.kinds[sender.kind].intra_host
            rate = link.bytes_per_second * min(sender.num_devices, receiver.num_devices)
            latency = link.latency
        else:
            links = [self.kinds[each.kind].inter_host for each in (sender, receiver)]
            rate = min(
                link.bytes_per_second * self.num_hosts(each)
                for link, each in zip(links, (sender, receiver), strict=True)
            )
            latency = max(link.latency for link in links)
        return np.where(nbytes > 0, nbytes / rate + 2 * latency, 0.0)
