"""Where an earlier step has placed the arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.spec import MeshAxes, Spec, axes_text, num_devices


@dataclass(frozen=True)
class PlacedArguments:
    """Where the distributed arguments of a call are.

    Attributes:
        num_stages: of the step that placed them.
        stages: the stages that hold each, by argument number.
        mesh: of every stage, if it has several devices.
        specs: how each is sharded over it, by argument number.
    """

    num_stages: int
    stages: tuple[tuple[int, tuple[int, ...]], ...]
    mesh: MeshAxes | None = None
    specs: tuple[tuple[int, Spec], ...] = ()

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
        meshes = {mesh: leaf for _, leaf in placed for mesh in leaf.placement.meshes.values()}
        if len(meshes) > 1:
            (one, leaf), (other, another) = list(meshes.items())[:2]
            raise ConfigError(
                f"{leaf.path} was placed on a mesh {axes_text(one)}, {another.path} on {axes_text(other)}",
                where=line_here(),
                why="arguments that are placed already share their mesh",
                fix="give both steps the same mesh, or pass bactrian.gather(...) of one of them",
            )
        mesh = next(iter(meshes), None)
        if mesh is None or num_devices(mesh) == 1:
            return cls(first.placement.num_stages, stages)
        specs = tuple((number, leaf.placement.specs[leaf.stages[0]]) for number, leaf in placed)
        return cls(first.placement.num_stages, stages, mesh, specs)
