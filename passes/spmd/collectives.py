"""Collectives of StableHLO, as ``shard_map`` writes them: between the devices that differ along some axes of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.spmd.devices import Devices

_DEVICE_TO_DEVICE = 1  # StableHLO's type of a channel
COLLECTIVES = frozenset(
    f"stablehlo.{name}" for name in ("all_gather", "all_reduce", "all_to_all", "collective_permute", "reduce_scatter")
)


class Collectives:
    """Writes collectives at the current insertion point.

    Args:
        devices: of the program that they stand in.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices, self._channels = devices, 0
        self._written: dict[tuple[Hashable, ...], ir.Value] = {}

    def all_gather(self, value: ir.Value, dim: int, axes: Sequence[str]) -> ir.Value:
        """The shards of a group one behind the other along a dim."""
        tensor = ir.RankedTensorType(value.type)
        shape = list(tensor.shape)
        shape[dim] *= self.devices.group_size(axes)
        attributes = {"all_gather_dim": _i64(dim), **self._groups(axes)}
        return self._one("stablehlo.all_gather", value, shape, attributes)

    def all_reduce(self, value: ir.Value, axes: Sequence[str], fold: str) -> ir.Value:
        """What the devices of a group hold, folded position by position with ``fold``, an op of two operands."""
        tensor = ir.RankedTensorType(value.type)
        return self._one("stablehlo.all_reduce", value, tensor.shape, self._groups(axes), fold)

    def reduce_scatter(self, value: ir.Value, dim: int, axes: Sequence[str]) -> ir.Value:
        """The sum of what the devices of a group hold, of which each keeps a shard along a dim."""
        tensor = ir.RankedTensorType(value.type)
        shape = list(tensor.shape)
        shape[dim] //= self.devices.group_size(axes)
        attributes = {"scatter_dimension": _i64(dim), **self._groups(axes)}
        return self._one("stablehlo.reduce_scatter", value, shape, attributes, "stablehlo.add")

    def scatter_rows(self, value: ir.Value, groups: ir.Attribute) -> ir.Value:
        """The sum of what the devices of each of ``groups`` hold, of which each keeps the row of its place in the group."""
        shape = [1, *ir.RankedTensorType(value.type).shape[1:]]
        attributes = {"scatter_dimension": _i64(0), **self._groups(()), "replica_groups": groups}
        return self._one("stablehlo.reduce_scatter", value, shape, attributes, "stablehlo.add")

    def all_to_all(self, value: ir.Value, split: int, concatenate: int, axes: Sequence[str]) -> ir.Value:
        """Split along one dim, send each part to a device of the group, and put what comes together along another."""
        tensor, count = ir.RankedTensorType(value.type), self.devices.group_size(axes)
        shape = list(tensor.shape)
        shape[split] //= count
        shape[concatenate] *= count
        attributes = {
            "split_dimension": _i64(split),
            "concat_dimension": _i64(concatenate),
            "split_count": _i64(count),
            **self._groups(axes),
        }
        del attributes["use_global_device_ids"]
        return self._one("stablehlo.all_to_all", value, shape, attributes)

    def permute(self, value: ir.Value, sources: Mapping[int, int]) -> ir.Value:
        """What another device holds.

        Args:
            value: of every device.
            sources: of a device the one whose value it gets; zeros where there is none.
        """
        pairs = np.array([[source, target] for target, source in sorted(sources.items())], dtype=np.int64).reshape(
            -1, 2
        )
        attributes = {
            "source_target_pairs": ir.DenseElementsAttr.get(cast(Any, pairs)),
            "channel_handle": self._channel(),
        }
        return self._one("stablehlo.collective_permute", value, ir.RankedTensorType(value.type).shape, attributes)

    def once(self, key: tuple[Hashable, ...], write: Callable[[], ir.Value]) -> ir.Value:
        """What has been written in this block with the same key, or is written now.

        Args:
            key: equal for what is equal.
            write: writes it at the current insertion point.
        """
        place = (cast(Any, ir.InsertionPoint.current).block, *key)
        if place not in self._written:
            self._written[place] = write()
        return self._written[place]

    def _groups(self, axes: Sequence[str]) -> dict[str, ir.Attribute]:
        return {
            "replica_groups": ir.DenseElementsAttr.get(cast(Any, self.devices.groups(axes))),
            "channel_handle": self._channel(),
            "use_global_device_ids": ir.UnitAttr.get(),
        }

    def _channel(self) -> ir.Attribute:
        self._channels += 1
        return stablehlo.ChannelHandle.get(self._channels, _DEVICE_TO_DEVICE)

    def _one(
        self, name: str, value: ir.Value, shape: Sequence[int], attributes: dict[str, ir.Attribute], fold: str = ""
    ) -> ir.Value:
        """One collective. Nothing is sent of a value without elements: StableHLO allows no collectives of these."""
        element = ir.RankedTensorType(value.type).element_type
        if 0 in shape:
            empty = ir.RankedTensorType.get(shape, element)
            return ir.Operation.create("stablehlo.reshape", results=[empty], operands=[value]).results[0]
        op = ir.Operation.create(
            name,
            results=[ir.RankedTensorType.get(shape, element)],
            operands=[value],
            attributes=attributes,
            regions=1 if fold else 0,
        )
        if fold:
            scalar = ir.RankedTensorType.get([], element)
            block = op.regions[0].blocks.append(scalar, scalar, arg_locs=[op.location] * 2)
            with ir.InsertionPoint(block):
                folded = ir.Operation.create(fold, results=[scalar], operands=list(block.arguments)).results[0]
                ir.Operation.create("stablehlo.return", operands=[folded])
        return op.results[0]


def _i64(number: int) -> ir.Attribute:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), number)
