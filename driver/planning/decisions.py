"""What is decided about a program before any pass runs, and the passes that carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bactrian.passes import pipelines
from bactrian.passes.machine.host_cores import num_cores
from bactrian.passes.machine.spec import MeshAxes, meshes_text, num_devices
from bactrian.passes.pipelines import Passes
from bactrian.passes.plan.pipeline_record import PipelineRecord
from bactrian.passes.plan.schema import Plan


@dataclass(frozen=True)
class Decisions:
    """What is decided before any pass runs.

    Attributes:
        num_layers: groups of forward ops to make, of which every stage has one or more.
        meshes: of each pipeline stage to make, names and sizes of the axes of its mesh.
        first_layers: the first layer of every stage, if given.
        donate: whether the update reuses the buffers of the old state.
        cluster: the file that describes the machines, "" for the cores of this host.
        strategy: how shardings are chosen, as ``solve-shardings`` knows it.
        compare: whether the baselines are solved too.
        time_limit: seconds for the choice of shardings.
        memory_bytes: of a device of each stage, that shardings may fill as long as it is not known what XLA needs beside;
            all of it if not given.
        tolerance: how much slower than the best choice a stage may be, as a part of its time.
        remat: what layers compute again: a word for each, or none.
        first_devices: of every stage, on the cluster's line; along the line if not given.
        record: how stages were found, where they were; then the program is grouped into layers as it was for that.
    """

    num_layers: int
    meshes: tuple[MeshAxes, ...]
    first_layers: tuple[int, ...] = ()
    donate: bool = True
    cluster: str = ""
    strategy: str = "auto"
    compare: bool = False
    time_limit: float = 60.0
    tolerance: float = 0.0
    memory_bytes: tuple[int, ...] = ()
    remat: tuple[str, ...] = ()
    first_devices: tuple[int, ...] = ()
    record: PipelineRecord | None = None

    @classmethod
    def of_plan(cls, plan: Plan, donate: bool, cluster: str = "") -> Decisions:
        """The decisions of an existing plan."""
        firsts = tuple(stage.first_layer for stage in plan.stages)
        meshes = tuple(stage.mesh for stage in plan.stages)
        strategy = next((stage.sharding.strategy for stage in plan.stages if stage.sharding is not None), "auto")
        places = tuple(stage.first_device for stage in plan.stages if stage.first_device is not None)
        return cls(
            plan.num_layers,
            meshes,
            firsts,
            donate,
            cluster,
            strategy,
            remat=plan.remat,
            first_devices=places if len(places) == plan.num_stages else (),
            record=plan.pipeline,
        )

    @property
    def num_stages(self) -> int:
        """Pipeline stages to make."""
        return len(self.meshes)

    @property
    def is_wide(self) -> bool:
        """Whether stages have several devices."""
        return any(num_devices(mesh) > 1 for mesh in self.meshes)

    @property
    def mesh_text(self) -> str:
        """The meshes as passes take them; nothing where stages have one device."""
        return meshes_text(self.meshes) if self.is_wide else ""

    def forming(self) -> Passes:
        """The passes up to ``assign-stages``."""
        return pipelines.up_to_stages(
            num_stages=self.num_stages,
            num_layers=self.num_layers if self.record is None else 0,
            boundaries=",".join(map(str, self.first_layers)),
            mesh=self.mesh_text,
            cluster=self.cluster,
            remat=",".join(self.remat),
            most_layers=0 if self.record is None else self.record.most_layers,
            first_devices=",".join(map(str, self.first_devices)),
        )

    def localizing(self, unhoisted: Sequence[int] = ()) -> Passes:
        """The passes from there to what ``solve-shardings`` reads.

        Args:
            unhoisted: stages that compute for each microbatch what none of them changes.
        """
        return pipelines.up_to_shardings(self.mesh_text, self.cluster, ",".join(map(str, unhoisted)))

    def emitting(self, memory_bytes: Sequence[int] = ()) -> Passes:
        """The passes from there to the scheduled module.

        Args:
            memory_bytes: of a device of each stage that shardings may fill; what the cluster says if not given.
        """
        return pipelines.up_to_schedule(
            self.mesh_text,
            self.cluster,
            self.strategy,
            self.donate,
            ",".join(map(str, memory_bytes)),
            self.time_limit,
            self.compare,
            self.tolerance,
            num_cores(),
        )
