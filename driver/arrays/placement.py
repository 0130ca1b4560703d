"""Where an argument of a step lives: its stages, their meshes and how it is sharded over each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from bactrian.driver.arrays.leaf_types import physical
from bactrian.passes.frame.errors import PassError
from bactrian.passes.machine.spec import MeshAxes, Spec, axes_text, num_devices


@dataclass(frozen=True)
class ArgumentPlacement:
    """Where one captured argument lives.

    Attributes:
        argument: its number in the captured module.
        argnum: the step's positional argument that it belongs to.
        path: the user's pytree path.
        shape, dtype: as the user sees them; a typed key has its key dtype.
        stages: the stages that hold it, in order.
        shardings: for the stages that this rank runs, where their copies go.
        ranks: for every stage in ``stages``, the ranks that run it.
        specs: for every stage in ``stages``, how its mesh shards the array.
        stage_meshes: names and sizes of the axes of the mesh of each stage of the step, whether it holds the array or not.
        rows: for the stages that hold only some rows of it, the first and the one behind the last.
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
    specs: Mapping[int, Spec] = field(default_factory=dict[int, Spec])
    stage_meshes: tuple[MeshAxes, ...] = ()
    key_impl: Any = None
    num_stages: int = 0
    weak_type: bool = False
    rows: Mapping[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    def part(self, stage: int, values: Any) -> Any:
        """What a stage holds of the whole array's values."""
        return values[slice(*self.rows[stage])] if stage in self.rows else values

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The stages that the whole array is read from: the first, or the first ones that have all rows together.

        Raises:
            PassError: some rows are on no stage.
        """
        whole = [stage for stage in self.stages if stage not in self.rows]
        if whole:
            return (whole[0],)
        found, covered = list[int](), 0
        for stage in sorted(self.stages, key=lambda stage: self.rows[stage]):
            start, stop = self.rows[stage]
            if start > covered:
                break
            if stop > covered:
                found.append(stage)
                covered = stop
        if self.stages and covered < self.shape[0]:
            raise PassError(f"row {covered} of {self.path} is on no stage")
        return tuple(found)

    @cached_property
    def stages_here(self) -> tuple[int, ...]:
        """The stages whose pieces are the whole array and are in this process; none if it has not all."""
        own = [
            stage
            for stage, sharding in self.shardings.items()
            if sharding.is_fully_addressable or sharding.is_fully_replicated
        ]
        whole = [stage for stage in own if stage not in self.rows]
        if whole:
            return (whole[0],)
        return self.sources if set(own).issuperset(self.sources) else ()

    def whole(self, pieces: Iterable[tuple[int, np.ndarray[Any, Any]]]) -> np.ndarray[Any, Any]:
        """The whole array, as it is carried, from what one stage has of it, or from the rows of several."""
        values: np.ndarray[Any, Any] | None = None
        for stage, piece in pieces:
            if stage not in self.rows:
                return piece
            if values is None:
                values = np.empty(physical(self.shape, self.dtype).shape, piece.dtype)
            self.part(stage, values)[...] = piece
        assert values is not None, f"{self.path} is on no stage"
        return values

    @property
    def is_replicated(self) -> bool:
        """Whether each device of its stages has all of it."""
        return not self.rows and all(
            spec.num_shards(dict(self.stage_meshes[stage])) == 1 for stage, spec in self.specs.items()
        )

    @property
    def sharding_text(self) -> str:
        """Meshes and shardings in words."""
        texts = list[str]()
        for stage in self.stages:
            axes = self.stage_meshes[stage] if self.stage_meshes else ()
            rows = "rows {} to {} ".format(*self.rows[stage]) if stage in self.rows else ""
            if num_devices(axes) == 1:
                texts.append(f"{rows}on one device")
                continue
            dims = enumerate(self.specs[stage].dims)
            sharded = [f"dim {dim} over {' and '.join(names)}" for dim, names in dims if names]
            texts.append(f"{rows}{', '.join(sharded) or 'replicated'} on mesh {axes_text(axes)}")
        return "; ".join(dict.fromkeys(texts))

    def same_place(self, other: ArgumentPlacement) -> bool:
        """Whether what lives at the other one lives here too, piece by piece."""
        return (self.stages, self.shardings, self.rows) == (other.stages, other.shardings, other.rows)

    def same_specs(self, other: ArgumentPlacement) -> bool:
        """Whether the other one's stages have equal meshes here, and equal shardings."""
        return self.stage_meshes == other.stage_meshes and all(
            self.specs.get(stage) == spec for stage, spec in other.specs.items()
        )

    @cached_property
    def aval_key(self) -> tuple[tuple[int, ...], Any, bool]:
        """Shape, dtype and weak type, as calls are told apart by."""
        return self.shape, self.dtype, self.weak_type
