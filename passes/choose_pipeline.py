"""``choose-pipeline``: the stages, their meshes and places, the schedule, and what layers compute again."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.ir.attributes import (
    FIRST_DEVICES,
    FIRST_LAYERS,
    NUM_LAYERS,
    REMAT,
    SCHEDULE,
    argument_pinned_stages,
    read_num_microbatches,
    required_integer,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import ONE_DEVICE, make_stage_meshes
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.cluster_file import cluster_or_cores
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.spec import MeshAxes, num_devices, parse_meshes
from bactrian.passes.pipelining.layer_menus import SizedLayers, menus, mesh_shapes
from bactrian.passes.pipelining.layer_options import Menu
from bactrian.passes.pipelining.layer_programs import LayerReading, batch_rows
from bactrian.passes.pipelining.layers import ProgramLayers
from bactrian.passes.pipelining.measured_stages import parse_stages
from bactrian.passes.pipelining.pipeline_candidates import ChosenPipeline, PipelineRequest, check_fixed, choose_pipeline
from bactrian.passes.pipelining.pipeline_problem import FixedStages
from bactrian.passes.pipelining.pipeline_shortage import OpenWays
from bactrian.passes.plan.remat_words import parse_remat
from bactrian.passes.schedules.by_name import SCHEDULES, schedule_named
from bactrian.passes.stages.op_times import OpTimes

_SCHEDULES = tuple(sorted(SCHEDULES.values(), key=lambda schedule: schedule.in_flight(0, 8, 64)))
"""Those that hold the fewest microbatches first: of two that take equally long, the first is chosen."""


class KnownMenus(dict[int, tuple[ProgramLayers, tuple[tuple[Menu, ...], ...]]]):
    """The layers of a program and what they may choose, by number of microbatches: for searches that are made again."""


@dataclass(frozen=True)
class ChoosePipeline(Pass):
    """Find the stages that take a step the least time, their meshes and places, the schedule, and what to compute again.

    Layers that follow one another are put together into stages, and each stage gets a mesh of its own, of devices beside
    each other on the line of the ``cluster``'s hosts. Without a cluster each stage has one device. Layers are read as
    programs of their own, and for each mesh there are a few choices of their shardings and of what they compute again;
    of all combinations the one of the least step time is found for which each stage's memory fits, with as many
    microbatches in flight as the schedule has there. Transfers between stages, round trips that the schedule does not
    hide, and the update count. What is given with options is not searched for; with ``measured``, stages take as much
    longer than their layers say as those that were measured did. The number of microbatches is that of the
    module; with ``num-microbatches``, layers are scaled to another one, for which the step has to be traced again.

    Requires: ``bactrian.num_layers`` and ``bactrian.layer`` (``group-layers``); ``bactrian.num_microbatches``.
    Ensures: ``bactrian.first_layers`` and ``bactrian.first_devices``, the first layer and the first device of each stage;
    meshes ``@stage0``, ``@stage1``, ... at the top of the module; ``bactrian.schedule``; and ``bactrian.remat`` where a
    layer computes anything again.

    Input:

    ```mlir
    module attributes {bactrian.num_layers = 2 : i64, bactrian.num_microbatches = 8 : i64} {
      func.func public @main(%v: tensor<1024x1024xf32> {bactrian.role = "state"},
          %w: tensor<1024x1024xf32> {bactrian.role = "state"}, %x: tensor<512x1024xf32> {bactrian.role = "batch"})
          -> tensor<512x1024xf32> {
        %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0]
          {bactrian.layer = 0 : i64, bactrian.phase = "forward"}
          : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
        %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0]
          {bactrian.layer = 1 : i64, bactrian.phase = "forward"}
          : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
        %s = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
          {kinds = "output", reductions = "sum"}} : (tensor<512x1024xf32>) -> tensor<512x1024xf32>
        return %s : tensor<512x1024xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.first_devices = array<i64: 0, 1>, bactrian.first_layers = array<i64: 0, 1>,
        bactrian.num_layers = 2 : i64, bactrian.num_microbatches = 8 : i64, bactrian.schedule = "eager-1f1b"} {
      sdy.mesh @stage0 = <["data"=1]>
      sdy.mesh @stage1 = <["data"=1]>
      func.func public @main(%v: tensor<1024x1024xf32> {bactrian.role = "state"},
          %w: tensor<1024x1024xf32> {bactrian.role = "state"}, %x: tensor<512x1024xf32> {bactrian.role = "batch"})
          -> tensor<512x1024xf32> {
        %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0]
          {bactrian.layer = 0 : i64, bactrian.phase = "forward"}
          : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
        %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0]
          {bactrian.layer = 1 : i64, bactrian.phase = "forward"}
          : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
        %s = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
          {kinds = "output", reductions = "sum"}} : (tensor<512x1024xf32>) -> tensor<512x1024xf32>
        return %s : tensor<512x1024xf32>
      }
    }
    ```

    Two stages take 9 times as long as a product, one stage would take 16. Eager 1F1B hides the transfer between them.
    """

    name: ClassVar[str] = "choose-pipeline"
    summary: ClassVar[str] = "find the stages, their meshes, the schedule, and what is computed again"
    requires: ClassVar[tuple[str, ...]] = (
        "formed",
        "flat",
        "typed",
        "marked",
        "phased",
        "with-layers",
        "with-num-microbatches",
        "with-boundary",
    )
    ensures: ClassVar[tuple[str, ...]] = ("layered",)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("kinds", "different layers"),
        Statistic("meshes", "meshes that stages could have"),
        Statistic("stages", "stages chosen"),
    )

    num_stages: int = option(0, help="how many stages; found if 0")
    boundaries: str = option("", help='the first layer of each stage, as in "0,3,5"; found if not given')
    mesh: str = option("", help='the mesh of all stages, or of each, as in "data=2;data=4"; found if not given')
    schedule: str = option("", help="the schedule; the best one if not given")
    remat: str = option("", help="none, products or all for all layers; found if not given")
    cluster: str = option("", help="TOML file of the devices; stages of one core of this host each if empty")
    num_microbatches: int = option(0, help="how many microbatches to plan for; as many as the module has if 0")
    measured: str = option(
        "", help="measured stages, as in '0-4 on data=2 of 8 takes 1.5 1.0; ...': factors of their predicted seconds"
    )
    memory_share: str = option(
        "", help='of a device\'s memory what stages may fill, by group of hosts, as in "0.9,1"; all of it if not given'
    )
    num_workers: int = option(1, help="processes that solve layers on meshes; the result is the same for any number")

    def check_options(self) -> None:
        """Decisions do not contradict each other."""
        for name, value in (("num-stages", self.num_stages), ("num-microbatches", self.num_microbatches)):
            if value < 0:
                raise ConfigError(f"option {name} of {self.name} is {value}, must not be negative")
        if self.schedule:
            schedule_named(self.schedule)
        parse_stages(self.measured)
        if len(parse_remat(self.remat)) > 1:
            raise ConfigError(f"option remat of {self.name} is {self.remat!r}, must be one word for all layers")
        self._memory_shares()
        fixed = self._fixed()
        counts = {
            f"num-stages {self.num_stages}": fixed.num_stages,
            f"boundaries {self.boundaries!r}": None if fixed.first_layers is None else len(fixed.first_layers),
            f"mesh {self.mesh!r}": len(fixed.meshes) if fixed.meshes is not None and len(fixed.meshes) > 1 else None,
        }
        given = {name: count for name, count in counts.items() if count is not None}
        if len(set(given.values())) > 1:
            said = ", ".join(f"{name} means {count}" for name, count in given.items())
            raise ConfigError(f"options of {self.name} disagree about the number of stages: {said}")

    def _memory_shares(self) -> tuple[float, ...]:
        try:
            shares = tuple(float(word) for word in self.memory_share.split(",")) if self.memory_share.strip() else ()
        except ValueError:
            shares = (0.0,)
        if not all(0 < share <= 1 for share in shares):
            raise ConfigError(
                f"option memory-share of {self.name} is {self.memory_share!r}, must be numbers above 0 and up to 1",
                fix='as in "0.9", or "0.9,1" for two groups of hosts',
            )
        return shares

    def _fixed(self) -> FixedStages:
        meshes = parse_meshes(self.mesh) if self.mesh.strip() else None
        if not self.boundaries.strip():
            return FixedStages(self.num_stages or None, None, meshes)
        try:
            starts = tuple(int(word) for word in self.boundaries.split(","))
        except ValueError:
            starts = ()
        if starts[:1] != (0,) or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ConfigError(
                f"option boundaries of {self.name} is {self.boundaries!r}, must begin with 0 and grow",
                fix='as in "0,3,5"',
            )
        return FixedStages(self.num_stages or None, starts, meshes)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Read layers, solve them on meshes, search, write what was found."""
        main, num_microbatches = main_function(module), self.num_microbatches or read_num_microbatches(module)
        if argument_pinned_stages(main):
            raise error_at(
                ConfigError,
                main,
                "cannot choose stages: another step has placed the state",
                fix="give num_stages and mesh of that step, or pass bactrian.gather(...) of the state",
            )
        cluster = cluster_or_cores(self.cluster)
        if len(self._memory_shares()) not in (0, len(cluster.groups)):
            raise ConfigError(
                f"option memory-share of {self.name} is {self.memory_share!r}, {cluster.name} has {len(cluster.groups)} "
                "groups of hosts",
                fix="give one number for each",
            )
        with _errors_at(main):
            check_fixed(
                self._fixed(), cluster, required_integer(module.operation, NUM_LAYERS, "run group-layers first")
            )
        known = ctx.kept(KnownMenus)
        known = KnownMenus() if known is None else known
        program = ctx.kept(LayerReading)
        if num_microbatches not in known:
            with ctx.clock.phase("read layers"):
                rows = self._rows(module, num_microbatches)
                program = program or LayerReading(module, self.cluster)
                read = [program.layers(group, rows) for group in cluster.groups]
            with ctx.clock.phase("solve layers"):
                each = zip(read, cluster.groups, strict=True)
                made = tuple(self._menus(own, group, num_microbatches) for own, group in each)
            known[num_microbatches] = read[0], made
        layers, found = known[num_microbatches]
        with ctx.clock.phase("search"), _errors_at(main):
            chosen = choose_pipeline(self._request(layers, found, cluster, num_microbatches))
        _write(module, chosen)
        for analysis in (ctx.kept(MainDataflow), ctx.kept(OpTimes), program, chosen):
            if analysis is not None:
                ctx.keep(analysis)
        ctx.count("kinds", len(layers.kinds))
        ctx.count("meshes", sum(map(len, found)))
        ctx.count("stages", len(chosen.choice.stages))

    def _rows(self, module: ir.Module, num_microbatches: int) -> int:
        """Of the batch in one of so many microbatches."""
        rows = batch_rows(main_function(module)) * read_num_microbatches(module)
        if rows % num_microbatches:
            raise ConfigError(
                f"option num-microbatches of {self.name} is {num_microbatches}, which does not divide {rows} rows of the batch"
            )
        return rows // num_microbatches

    def _request(
        self, layers: ProgramLayers, found: tuple[tuple[Menu, ...], ...], cluster: Cluster, num_microbatches: int
    ) -> PipelineRequest:
        schedules = (schedule_named(self.schedule),) if self.schedule else _SCHEDULES
        borders = tuple(map(float, layers.border_bytes))
        measured, shares = parse_stages(self.measured), self._memory_shares()
        if (last := max((stage.end_layer for stage in measured), default=0)) > layers.num_layers:
            raise ConfigError(f"a measured stage ends at layer {last - 1}, the program has {layers.num_layers} layers")
        return PipelineRequest(
            layers.kind_of,
            borders,
            found,
            cluster,
            num_microbatches,
            schedules,
            self._fixed(),
            self._ways(layers.rows),
            measured,
            shares,
        )

    def _ways(self, rows: int) -> OpenWays:
        given = {
            "num_stages": self.num_stages,
            "boundaries": self.boundaries,
            "mesh": self.mesh,
            "schedule": self.schedule,
            "remat": self.remat,
        }
        return OpenWays(tuple(name for name, value in given.items() if value), rows > 1)

    def _menus(self, layers: ProgramLayers, group: HostGroup, num_microbatches: int) -> tuple[Menu, ...]:
        """What layers may choose on the meshes that stages may have on hosts of a group."""
        sized = [SizedLayers(layers, num_microbatches)]
        meshes = self._fixed().meshes
        if meshes is not None:
            each = [
                menus(sized, group, [axes], self.num_workers)[0] for axes in dict.fromkeys(meshes) if _has(group, axes)
            ]
            found = tuple(itertools.chain.from_iterable(each))
        else:
            (made,) = menus(sized, group, mesh_shapes(group) if self.cluster else [ONE_DEVICE], self.num_workers)
            found = tuple(Menu(_plain(menu.mesh), menu.options) for menu in made)
        words = parse_remat(self.remat)
        return tuple(_with_remat(menu, words[0]) for menu in found) if words else found


@contextmanager
def _errors_at(main: ir.Operation) -> Generator[None]:
    """Errors of the block stand at the function."""
    try:
        yield
    except (ConfigError, InfeasiblePlanError) as error:
        raise error_at(type(error), main, error.message, why=error.why, fix=error.fix) from None


def _has(group: HostGroup, axes: MeshAxes) -> bool:
    """Whether devices of a group make a mesh."""
    count = num_devices(axes)
    return count <= group.num_devices and (count <= group.devices_per_host or count % group.devices_per_host == 0)


def _plain(axes: MeshAxes) -> MeshAxes:
    """Without axes of one device."""
    return tuple((name, size) for name, size in axes if size > 1) or ONE_DEVICE


def _with_remat(menu: Menu, word: str) -> Menu:
    """The options that compute again what a word says; of a layer that keeps nothing, there is none but ``none``."""
    options = tuple(
        tuple(option for option in of_kind if option.remat == word) or tuple(o for o in of_kind if o.remat == "none")
        for of_kind in menu.options
    )
    return Menu(menu.mesh, options)


def _write(module: ir.Module, chosen: ChosenPipeline) -> None:
    stages, attributes = chosen.choice.stages, module.operation.attributes
    attributes[SCHEDULE] = ir.StringAttr.get(chosen.schedule.name)
    attributes[FIRST_LAYERS] = ir.DenseI64ArrayAttr.get([stage.place.first_layer for stage in stages])
    attributes[FIRST_DEVICES] = ir.DenseI64ArrayAttr.get(list(chosen.first_devices))
    make_stage_meshes(module, [stage.mesh for stage in stages])
    if chosen.remat:
        attributes[REMAT] = ir.ArrayAttr.get([ir.StringAttr.get(word) for word in chosen.remat])
