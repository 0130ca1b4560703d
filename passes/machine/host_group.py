"""Equal hosts: the speed of their devices and links, and the meshes that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.collective_times import Curve
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.spec import MeshAxes, axes_text, num_devices


@dataclass(frozen=True)
class HostGroup:
    """Equal hosts with equal devices, neighbours of each other.

    Attributes:
        name: how reports call this kind of host.
        hosts: how many.
        devices_per_host: how many on each.
        memory_bytes: of one device.
        device: the speed of one device.
        intra_host_bytes_per_second: from one device to others of its host.
        inter_host_bytes_per_second: from one host to others; its devices share it.
        intra_host_latency, inter_host_latency: seconds of the smallest collective.
        measured: curves of collectives inside a host, which take the place of the formulas; at most one for each kind and
            size of the group.
        call_seconds: what a call of a stage function takes beside its work.
    """

    name: str
    hosts: int
    devices_per_host: int
    memory_bytes: int
    device: Device
    intra_host_bytes_per_second: float
    inter_host_bytes_per_second: float
    intra_host_latency: float = 5e-6
    inter_host_latency: float = 2e-5
    measured: tuple[Curve, ...] = ()
    call_seconds: float = 0.0

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.hosts * self.devices_per_host

    def mesh(self, axes: MeshAxes) -> Mesh:
        """A mesh over the first devices, the last axis over neighbours.

        An axis inside a host takes what was measured of groups of its size, if anything was, else the link of the host.
        An axis that leaves the host pays the link between hosts; rings of its neighbours along inner axes share it.

        Raises:
            ConfigError: there are fewer devices, or hosts would be cut unevenly.
        """
        text = axes_text(axes)
        count = num_devices(axes)
        if count > self.num_devices:
            raise ConfigError(
                f"mesh {text} needs {count} devices, {self.name} has {self.num_devices}",
                why=f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.devices_per_host} devices",
                fix="take a smaller mesh, or describe a larger cluster",
            )
        if count > self.devices_per_host and count % self.devices_per_host:
            raise ConfigError(
                f"mesh {text} of {count} devices does not fill hosts of {self.devices_per_host} devices",
                fix="make the product of the sizes a multiple of the devices of a host",
            )
        made, stride = list[Axis](), 1
        for name, size in reversed(axes):
            curves = tuple[Curve, ...]()
            if stride * size <= self.devices_per_host:
                link = self.intra_host_latency, 1 / self.intra_host_bytes_per_second
                curves = tuple(curve for curve in self.measured if curve.group == size)
            else:
                sharing = min(stride, self.devices_per_host)
                between = sharing / self.inter_host_bytes_per_second
                link = self.inter_host_latency, max(between, 1 / self.intra_host_bytes_per_second)
            made.append(Axis(name, size, *link, curves))
            stride *= size
        inside = tuple(c for c in self.measured if c.kind == "all_reduce") if count <= self.devices_per_host else ()
        return Mesh(tuple(reversed(made)), inside, 2 / self.device.bytes_per_second)
