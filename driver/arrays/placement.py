"""Where an argument of a step lives: its stages, their meshes and how it is sharded over each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax

from bactrian.passes.plan.schema import Axes, axes_words

Layout = tuple[tuple[str, ...], ...]  # the axes that cut each dim


@dataclass(frozen=True)
class Placement:
    """Where one captured argument lives.

    Attributes:
        argument: its number in the captured module.
        argnum: the step's positional argument that it belongs to.
        path: the user's pytree path.
        shape, dtype: as the user sees them; a typed key has its key dtype.
        stages: the stages that hold it, in order.
        shardings: for the stages that this rank runs, where their copies go.
        ranks: for every stage in ``stages``, the ranks that run it.
        layouts: for every stage in ``stages``, the axes of its mesh that cut each dim; empty on one device.
        meshes: for every stage in ``stages``, names and sizes of its mesh's axes.
        key_impl: of a typed key, which is carried as its uint32 words.
        num_stages: of the step that placed it; 0 if no step did.
        weak_type: JAX's weak type, so that a state that began as a Python number is not traced a second time.
    """

    argument: int
    argnum: int | None
    path: str
    shape: tuple[int, ...]
    dtype: Any
    stages: tuple[int, ...]
    shardings: Mapping[int, jax.sharding.Sharding] = field(default_factory=dict[int, jax.sharding.Sharding])
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    layouts: Mapping[int, Layout] = field(default_factory=dict[int, Layout])
    meshes: Mapping[int, Axes] = field(default_factory=dict[int, Axes])
    key_impl: Any = None
    num_stages: int = 0
    weak_type: bool = False

    @property
    def layout(self) -> str:
        """Meshes and layouts in words."""
        texts = list[str]()
        for stage in self.stages:
            axes = self.meshes.get(stage, ())
            if all(size == 1 for _, size in axes):
                texts.append("whole on one device")
                continue
            mesh = axes_words(axes)
            cuts = [f"dim {dim} over {' and '.join(names)}" for dim, names in enumerate(self.layouts[stage]) if names]
            texts.append(f"{', '.join(cuts) or 'whole on every device'} of {mesh}")
        return "; ".join(dict.fromkeys(texts))

    def same_place(self, other: Placement) -> bool:
        """Whether what lives at the other one lives here too, piece by piece."""
        return self.stages == other.stages and self.shardings == other.shardings

    def same_layouts(self, other: Placement) -> bool:
        """Whether the other one's stages have equal meshes here, and equal layouts."""
        return all(
            self.meshes.get(stage) == mesh and self.layouts.get(stage) == other.layouts.get(stage)
            for stage, mesh in other.meshes.items()
        )

    @cached_property
    def aval_key(self) -> tuple[tuple[int, ...], Any, bool]:
        """Shape, dtype and weak type, as calls are told apart by."""
        return self.shape, self.dtype, self.weak_type
