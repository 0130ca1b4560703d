"""Where an earlier step has placed the arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.spec import MeshAxes, Spec, meshes_text, num_devices


@dataclass(frozen=True)
class PlacedArguments:
    """Where the distributed arguments of a call are.

    Attributes:
        num_stages: of the step that placed them.
        stages: the stages that hold each, by argument number.
        meshes: of every stage, if any has several devices.
        shardings: how the mesh of each stage that holds it shards it: argument number, and pairs (stage, spec).
    """

    num_stages: int
    stages: tuple[tuple[int, tuple[int, ...]], ...]
    meshes: tuple[MeshAxes, ...] = ()
    shardings: tuple[tuple[int, tuple[tuple[int, Spec], ...]], ...] = ()

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> PlacedArguments | None:
        """Where an earlier step has placed a call's array leaves, None if no step placed any.

        Raises:
            ConfigError: the leaves come from steps with different numbers of stages or meshes.
        """
        placed = [
            (number, leaf)
            for number, leaf in enumerate(leaves)
            if isinstance(leaf, DistributedArray) and leaf.stages and leaf.placement.num_stages
        ]
        if not placed:
            return None
        first = placed[0][1]
        for _, leaf in placed:
            if leaf.placement.num_stages != first.placement.num_stages:
                raise ConfigError(
                    f"{first.path} was placed by a step of {first.placement.num_stages} stages, "
                    f"{leaf.path} by one of {leaf.placement.num_stages}",
                    where=line_here(),
                    why="arguments that are placed already share their stages",
                    fix="give both steps the same num_stages, or pass bactrian.gather(...) of one of them",
                )
        stages = tuple((number, leaf.stages) for number, leaf in placed)
        meshes = first.placement.stage_meshes
        for _, leaf in placed:
            if leaf.placement.stage_meshes != meshes:
                raise ConfigError(
                    f"{first.path} was placed by a step on the mesh {meshes_text(meshes)}, "
                    f"{leaf.path} by one on {meshes_text(leaf.placement.stage_meshes)}",
                    where=line_here(),
                    why="arguments that are placed already share their meshes",
                    fix="give both steps the same mesh, or pass bactrian.gather(...) of one of them",
                )
        if all(num_devices(mesh) == 1 for mesh in meshes):
            return cls(first.placement.num_stages, stages)
        shardings = tuple((number, tuple(sorted(leaf.placement.specs.items()))) for number, leaf in placed)
        return cls(first.placement.num_stages, stages, meshes, shardings)

    @property
    def specs(self) -> dict[int, dict[int, Spec]]:
        """How each is sharded, by argument number and stage."""
        return {number: dict(of_stages) for number, of_stages in self.shardings}
