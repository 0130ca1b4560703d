"""The speed of one device, and the time of an op on it.

The time of an op is the roofline ``max(flops / rate, bytes / bandwidth)`` (Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model for multicore architectures", 2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpCost:
    """Work of one execution of an op; ``dtype`` is the element type that it computes in."""

    flops: float
    bytes: float
    dtype: str

    def __add__(self, other: OpCost) -> OpCost:
        heavier = self if self.flops >= other.flops else other
        return OpCost(self.flops + other.flops, self.bytes + other.bytes, heavier.dtype)

    def times(self, count: float) -> OpCost:
        """The same work ``count`` times."""
        return OpCost(self.flops * count, self.bytes * count, self.dtype)


@dataclass(frozen=True)
class Device:
    """Speed of one device.

    Args:
        name: how reports call it.
        flops_per_second: peak rate per element type (MLIR's names: ``f32``, ``bf16``); ``default`` for all others.
        bytes_per_second: memory bandwidth.
        repack_bytes_per_second: bytes of operands that it brings into another order for a product that `repacks`.
    """

    name: str
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    repack_bytes_per_second: float = math.inf

    def seconds(self, cost: OpCost) -> float:
        """Roofline time of one op: 1e9 flops at 1e11/s and 1e8 bytes at 2e10/s take max(0.01, 0.005) s."""
        rate = self.flops_per_second.get(cost.dtype) or self.flops_per_second["default"]
        return max(cost.flops / rate, cost.bytes / self.bytes_per_second)


CPU_CORE = Device(
    "cpu-core",
    {"default": 5.0e10, "f32": 5.0e10, "f64": 2.5e10, "bf16": 2.5e10, "f16": 2.5e10},
    1.0e10,
)
"""One core of a current server: two 8-wide fused multiply-adds a cycle at about 1.6 GHz, its share of the memory."""
