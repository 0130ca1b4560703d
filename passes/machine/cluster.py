"""A cluster: groups of equal hosts in a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.device import CPU_CORE
from bactrian.passes.machine.host_group import HostGroup


@dataclass(frozen=True)
class Cluster:
    """Hosts in a line: all of the first group, then all of the next. Devices are numbered along it, from 0.

    A mesh is made of devices beside each other, all of one group. One of at most a host's devices lies within a host; a
    larger one fills hosts. Where the line's order matters (which kind of host the first stages get), other orders are
    other clusters.

    >>> cluster = Cluster("two-kinds", (small, large))      # 2 hosts of 4 devices, then 1 of 8
    >>> cluster.num_devices, cluster.first_devices
    (16, (0, 8))
    >>> cluster.group_of(8).name, cluster.host_of(5), cluster.host_of(15)
    ('large', 1, 2)
    >>> cluster.next_place(6, 4)        # devices 6 to 9 are of two hosts
    8

    Attributes:
        name: how reports call it.
        groups: of equal hosts, one or more, in the order of the line.
    """

    name: str
    groups: tuple[HostGroup, ...]

    @property
    def num_devices(self) -> int:
        """All of them."""
        return sum(group.num_devices for group in self.groups)

    @cached_property
    def first_devices(self) -> tuple[int, ...]:
        """The number of each group's first device."""
        return tuple(accumulate((group.num_devices for group in self.groups[:-1]), initial=0))

    def group_of(self, device: int) -> HostGroup:
        """The group that a device belongs to."""
        return self.groups[self._group_number(device)]

    def host_of(self, device: int) -> int:
        """The host that a device belongs to, numbered along the line."""
        number = self._group_number(device)
        before = sum(group.hosts for group in self.groups[:number])
        return before + (device - self.first_devices[number]) // self.groups[number].devices_per_host

    def next_place(self, device: int, count: int) -> int | None:
        """The first place from a device on where ``count`` devices beside each other make a mesh: its first device.

        None where there is none: too few devices are left, or they don't fill hosts.
        """
        for group, first in zip(self.groups, self.first_devices, strict=True):
            end, host = first + group.num_devices, group.devices_per_host
            if device >= end or (count > host and count % host):
                continue
            inside = max(device, first) - first
            if count > host or inside % host + count > host:
                inside = -(-inside // host) * host
            if first + inside + count <= end:
                return first + inside
        return None

    def places(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The first device of each of several meshes that are laid along the line, each as early as it can be.

        Raises:
            ConfigError: they need more devices than there are.
        """
        placed, device = list[int](), 0
        for stage, count in enumerate(counts):
            place = self.next_place(device, count)
            if place is None:
                raise ConfigError(
                    f"stage {stage} of {count} device{'s' * (count > 1)} has no place in {self.name}",
                    why=f"{self.num_devices - device} of {self.num_devices} devices are behind the stages before it: "
                    f"{self.description}; a mesh lies within a host or fills hosts of one kind",
                    fix="take fewer stages or smaller meshes, or describe a larger cluster",
                )
            placed.append(place)
            device = place + count
        return tuple(placed)

    def link(self, sender: int, receiver: int) -> tuple[float, float]:
        """From one device to another: seconds of the smallest message, and bytes per second.

        Between hosts the rate is that of the slower one, which its other devices share, and the latency the larger one.
        """
        ends = self.group_of(sender), self.group_of(receiver)
        if self.host_of(sender) == self.host_of(receiver):
            return ends[0].intra_host_latency, ends[0].intra_host_bytes_per_second
        latency = max(end.inter_host_latency for end in ends)
        return latency, min(end.inter_host_bytes_per_second for end in ends)

    @property
    def description(self) -> str:
        """``2 hosts of 4 small, 1 host of 8 large``."""
        return ", ".join(
            f"{group.hosts} host{'s' * (group.hosts > 1)} of {group.devices_per_host} {group.name}"
            for group in self.groups
        )

    def only_group(self, wanted: str) -> HostGroup:
        """The hosts of a cluster whose hosts are all equal.

        Args:
            wanted: what needs that, for the error.

        Raises:
            ConfigError: there are several kinds.
        """
        first, *others = self.groups
        if others:
            raise ConfigError(
                f"{wanted} needs equal hosts, {self.name} has {len(self.groups)} kinds",
                why=self.description,
                fix="name a cluster file with one of them",
            )
        return first

    def _group_number(self, device: int) -> int:
        if not 0 <= device < self.num_devices:
            raise ValueError(f"device {device} of {self.num_devices}")
        return max(number for number, first in enumerate(self.first_devices) if first <= device)


CPU_HOST = HostGroup("cpu-host", 1, 64, 4 << 30, CPU_CORE, 2e9, 2e9, 5e-5, 5e-5)
"""Cores of one host as devices: collectives are copies through its memory."""

CPU_CLUSTER = Cluster("cpu-host", (CPU_HOST,))
