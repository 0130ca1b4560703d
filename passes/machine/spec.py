"""The named axes of a mesh, and how tensors are sharded over them, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bactrian.passes.frame.errors import ConfigError

MeshAxes = tuple[tuple[str, int], ...]
"""Names and sizes of a mesh's axes, the major one first."""

REPLICATED = "-"
"""A dim that no axis shards, in the text of a `Spec`."""

_AXIS = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+)\s*")
_UNREDUCED = "unreduced="


def parse_axes(text: str) -> MeshAxes:
    """``"data=2,model=4"`` as names and sizes.

    Raises:
        ConfigError: another form, a name twice, or a size of 0.
    """
    found = list[tuple[str, int]]()
    for part in text.split(","):
        match = _AXIS.fullmatch(part)
        if match is None:
            raise ConfigError(f"mesh {text!r} is not a list of axes", fix='write it as in "data=2,model=4"')
        found.append((match[1], int(match[2])))
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"mesh {text!r} has two axes of one name")
    if any(size == 0 for _, size in found):
        raise ConfigError(f"mesh {text!r} has an axis of size 0", fix="give sizes of 1 or more")
    return tuple(found)


def axes_text(axes: MeshAxes) -> str:
    """``data=2,model=4``: what `parse_axes` reads."""
    return ",".join(f"{name}={size}" for name, size in axes)


def parse_meshes(text: str) -> tuple[MeshAxes, ...]:
    """``"data=2,model=4;data=8"`` as the meshes of all stages, in their order; a single one stands for all of them.

    Raises:
        ConfigError: as `parse_axes`.
    """
    return tuple(parse_axes(part) for part in text.split(";"))


def meshes_text(meshes: Sequence[MeshAxes]) -> str:
    """What `parse_meshes` reads: one mesh where all are equal."""
    several = meshes if len(set(meshes)) > 1 else meshes[:1]
    return ";".join(axes_text(axes) for axes in several)


def meshes_of_stages(meshes: Sequence[MeshAxes], num_stages: int) -> tuple[MeshAxes, ...]:
    """The mesh of each stage, where one stands for all of them.

    Raises:
        ConfigError: there are neither one nor as many as stages.
    """
    if len(meshes) not in (1, num_stages):
        raise ConfigError(
            f"mesh is {';'.join(map(axes_text, meshes))}: {len(meshes)} meshes for "
            f"{num_stages} stage{'s' * (num_stages > 1)}",
            fix="give one mesh for all stages, or one for each",
        )
    return tuple(meshes) if len(meshes) == num_stages else tuple(meshes) * num_stages


def num_devices(axes: MeshAxes) -> int:
    """Devices of a mesh."""
    return math.prod(size for _, size in axes)


@dataclass(frozen=True, slots=True)
class Spec:
    """How a tensor is sharded over a mesh, as JAX's ``PartitionSpec("a", None, unreduced={"b"})`` and Shardy's
    ``#sdy.sharding<@mesh, [{"a"}, {}], unreduced={"b"}>`` say it.

    Along axes that are not named, devices hold the same values.

    Attributes:
        dims: for each dim of the tensor the axes that shard it, the major one first.
        unreduced: axes along which each device holds a partial sum of its own, in the mesh's order.
    """

    dims: tuple[tuple[str, ...], ...] = ()
    unreduced: tuple[str, ...] = ()

    @classmethod
    def replicated(cls, rank: int) -> Spec:
        """The spec of a tensor that every device holds whole."""
        return cls(((),) * rank)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """The inverse of ``str``.

        >>> Spec.parse("data+model,- unreduced=b")
        Spec(dims=(('data', 'model'), ()), unreduced=('b',))
        """
        dims, _, unreduced = text.partition(_UNREDUCED)
        entries = dims.strip().split(",") if dims.strip() else []
        return cls(
            tuple(() if entry == REPLICATED else tuple(entry.split("+")) for entry in entries),
            tuple(unreduced.split("+")) if unreduced else (),
        )

    def __str__(self) -> str:
        """The axes of each dim, ``-`` for a replicated one; empty for a scalar.

        >>> str(Spec((("data", "model"), ()))), str(Spec(((), ()), ("b",)))
        ('data+model,-', '-,- unreduced=b')
        """
        dims = ",".join("+".join(axes) or REPLICATED for axes in self.dims)
        return f"{dims} {_UNREDUCED}{'+'.join(self.unreduced)}".lstrip() if self.unreduced else dims

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that shard a dim."""
        return tuple(axis for axes in self.dims for axis in axes)

    @property
    def is_replicated(self) -> bool:
        """Whether every device holds the whole tensor."""
        return not self.unreduced and not any(self.dims)

    def with_dim(self, dim: int, axes: Iterable[str]) -> Spec:
        """The same spec with other axes on one dim."""
        return Spec((*self.dims[:dim], tuple(axes), *self.dims[dim + 1 :]), self.unreduced)

    def num_shards(self, sizes: Mapping[str, int]) -> int:
        """How many shards the tensor has.

        Args:
            sizes: of the mesh's axes.
        """
        return math.prod(sizes[axis] for axes in self.dims for axis in axes)

    def local_shape(self, shape: Iterable[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a shard: of dims that don't divide, the largest one.

        Args:
            shape: of the whole tensor.
            sizes: of the mesh's axes.

        >>> Spec((("a",), ())).local_shape((8, 3), {"a": 4})
        (2, 3)
        """
        return tuple(
            -(-size // math.prod(sizes[axis] for axis in axes)) for size, axes in zip(shape, self.dims, strict=True)
        )


UNSHARDED = Spec()
"""The spec of any value on one device: dims at the end that no axis shards may be left out."""
