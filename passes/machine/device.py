"""The speed of one device, and the time of an op on it.

The time of an op is the roofline ``max(flops / rate, bytes / bandwidth)`` (Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model for multicore architectures", 2009).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_FLOAT, _DIGITS = re.compile("b?f[0-9]"), re.compile("[0-9]+")


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
        flops_per_second: peak rate per element type (MLIR's names: ``f32``, ``bf16``); ``default`` for all others. Without
            it, they have the rate of the nearest type (`rated_as`).
        bytes_per_second: memory bandwidth.
        repack_bytes_per_second: bytes of operands that it brings into another order for a product that `repacks`.
    """

    name: str
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    repack_bytes_per_second: float = math.inf

    def seconds(self, cost: OpCost) -> float:
        """Roofline time of one op: 1e9 flops at 1e11/s and 1e8 bytes at 2e10/s take max(0.01, 0.005) s."""
        return max(cost.flops / self.rate(cost.dtype), cost.bytes / self.bytes_per_second)

    def rate(self, dtype: str) -> float:
        """Operations per second in an element type."""
        rates = self._known_rates
        if dtype not in rates:
            rates[dtype] = self.flops_per_second[self.rated_as(dtype)]
        return rates[dtype]

    def rated_as(self, dtype: str) -> str:
        """The element type whose rate another one has: itself, else ``default``, else the nearest.

        That is one of the same kind (float or integer) if there is any, as wide or wider if there is any, of the least
        difference in width.

        >>> v100 = Device("v100", {"f16": 125e12, "f32": 15.7e12}, 9e11)
        >>> [v100.rated_as(dtype) for dtype in ("f32", "bf16", "f64", "f8E4M3FN", "i32")]
        ['f32', 'f16', 'f32', 'f16', 'f32']
        """
        rates = self.flops_per_second
        if dtype in rates or "default" in rates:
            return dtype if dtype in rates else "default"
        wanted = _width(dtype)
        kin = [each for each in rates if _is_float(each) == _is_float(dtype)] or list(rates)
        return min(kin, key=lambda each: (_width(each) < wanted, abs(_width(each) - wanted), each))

    @cached_property
    def _known_rates(self) -> dict[str, float]:
        return dict(self.flops_per_second)


def _is_float(dtype: str) -> bool:
    return _FLOAT.match(dtype) is not None


def _width(dtype: str) -> int:
    """Bits of an element type: the first number of its name."""
    found = _DIGITS.search(dtype)
    return int(found[0]) if found else 32


CPU_CORE = Device(
    "cpu-core",
    {"default": 5.0e10, "f32": 5.0e10, "f64": 2.5e10, "bf16": 2.5e10, "f16": 2.5e10},
    1.0e10,
)
"""One core of a current server: two 8-wide fused multiply-adds a cycle at about 1.6 GHz, its share of the memory."""
