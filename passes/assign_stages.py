"""``assign-stages``: layers become pipeline stages."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    FIRST_DEVICES,
    NUM_LAYERS,
    NUM_MICROBATCHES,
    NUM_STAGES,
    REMAT,
    STAGE,
    UPDATE,
    argument_pinned_stages,
    argument_roles,
    integer,
    integer_attribute,
    layer_of,
    read_first_devices,
    read_first_layers,
    required_integer,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import make_stage_meshes, stage_axes
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import MeshAxes, meshes_of_stages, num_devices, parse_meshes
from bactrian.passes.plan.remat_words import parse_remat, words_of_layers
from bactrian.passes.stages import layer_partitioning
from bactrian.passes.stages.op_times import OpTimes
from bactrian.passes.stages.uneven_stages import warn_of_uneven_stages


@dataclass(frozen=True)
class AssignStages(Pass):
    """Put consecutive layers together into stages.

    The slowest stage sets the pace of a pipeline, so the longest time that a stage takes of a step, as it is predicted for
    a device of ``cluster``, is made as short as it can be; among equals, the fewest bytes cross between stages. On meshes
    of different sizes that is the time of one device over the devices of the stage. Or the first layer of each stage is
    given: with ``boundaries``, or by ``choose-pipeline`` where no option says how many stages there are. Every stage gets a mesh: of one device, or with the axes of ``mesh``, which names one mesh
    for all stages or one for each. ``remat`` says what layers compute again in their backward phase, which
    ``select-residuals`` carries out.

    Requires: ``bactrian.num_layers`` and ``bactrian.layer`` (``group-layers``).
    Ensures: ``bactrian.num_stages``; ``bactrian.stage`` on every op that has a layer, growing with the layer; meshes
    ``@stage0``, ``@stage1``, ... at the top of the module; ``bactrian.remat``, if a layer is computed again.

    Input:

    ```mlir
    module attributes {bactrian.num_layers = 2 : i64} {
      func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %y = stablehlo.negate %x {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : tensor<4xf32>
        %z = stablehlo.negate %y {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : tensor<4xf32>
        return %z : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_layers = 2 : i64, bactrian.num_stages = 2 : i64} {
      sdy.mesh @stage0 = <["data"=1]>
      sdy.mesh @stage1 = <["data"=1]>
      func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %y = stablehlo.negate %x
          {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %z = stablehlo.negate %y
          {bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
        return %z : tensor<4xf32>
      }
    }
    ```

    Each layer is a stage.
    """

    name: ClassVar[str] = "assign-stages"
    summary: ClassVar[str] = "put consecutive layers together into balanced stages"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat", "typed", "marked", "phased", "with-layers")
    ensures: ClassVar[tuple[str, ...]] = ("layered", "assigned")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("cut-bytes", "bytes of forward and backward values, summed over the stage boundaries they cross"),
    )

    num_stages: int = option(0, help="how many stages to make; 0: one per layer")
    boundaries: str = option("", help='the first layer of each stage, as in "0,3,5"; found if not given')
    mesh: str = option(
        "",
        help='the mesh of all stages, as in "data=2,model=4", or of each, as in "data=2;data=4"; '
        "one device if not given",
    )
    remat: str = option(
        "", help="none, products or all for all layers, or such a word for each, as in none,all: what is computed again"
    )
    first_devices: str = option(
        "", help='the first device of each stage on the line of hosts, as in "0,8"; along the line if not given'
    )
    cluster: str = option(
        "", help="TOML file of the devices that time is predicted for; the cores of this host if empty"
    )

    def check_options(self) -> None:
        """Boundaries begin with 0, grow, and are as many as the stages."""
        if self.num_stages < 0:
            raise ConfigError(f"option num-stages of {self.name} is {self.num_stages}, must not be negative")
        if self.mesh.strip():
            parse_meshes(self.mesh)
        parse_remat(self.remat)
        starts = self._given()
        if starts is None:
            return
        if starts[:1] != [0] or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ConfigError(
                f"option boundaries of {self.name} is {self.boundaries!r}, must begin with 0 and grow",
                fix='as in "0,3,5"',
            )
        if self.num_stages not in (0, len(starts)):
            raise ConfigError(
                f"options of {self.name} disagree: boundaries {self.boundaries!r} begin {len(starts)} stages, "
                f"num-stages is {self.num_stages}"
            )

    def _first_devices(self, num_stages: int) -> list[int]:
        words = self.first_devices.split(",")
        if len(words) != num_stages or not all(word.strip().isdecimal() for word in words):
            raise ConfigError(
                f"option first-devices of {self.name} is {self.first_devices!r}, "
                f"must be a number for each of the {num_stages} stages",
                fix='as in "0,8"',
            )
        return [int(word) for word in words]

    def _given(self) -> list[int] | None:
        if not self.boundaries.strip():
            return None
        try:
            return [int(word) for word in self.boundaries.split(",")]
        except ValueError:
            raise ConfigError(
                f"option boundaries of {self.name} is {self.boundaries!r}, must be integers", fix='as in "0,3,5"'
            ) from None

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Choose the first layer of each stage, write stages and meshes."""
        num_layers = required_integer(module.operation, NUM_LAYERS, "run group-layers first")
        flow = MainDataflow.kept_or_read(module, ctx)
        layers = [layer_of(op) for op in flow.ops]
        main = main_function(module)
        times = OpTimes.kept_or_predicted(module, self.cluster, ctx)
        microbatches = integer_attribute(module.operation, NUM_MICROBATCHES) or 1
        op_seconds = [
            once if phase == UPDATE else microbatches * once
            for phase, once in zip(flow.phases, times.seconds, strict=True)
        ]
        seconds, crossing = _layer_costs(flow, op_seconds, argument_roles(main), layers, num_layers)
        given = self._given()
        if given is None and self.num_stages == 0 and (chosen := read_first_layers(module)) is not None:
            given = list(chosen)
        num_stages = len(given) if given is not None else self.num_stages or num_layers
        make_stage_meshes(module, self._meshes(num_stages))
        devices = list(map(num_devices, stage_axes(module, num_stages)))
        starts = given if given is not None else self._balanced(seconds, crossing, devices, main, ctx)
        if starts is None:
            return
        if starts[-1] >= num_layers:
            ctx.error(
                main,
                f"cannot begin a stage at layer {starts[-1]}: the program has {num_layers} layers",
                fix="boundaries name the first layer of each stage, layers count from 0",
            )
            return
        stages = [bisect.bisect_right(starts, layer) - 1 for layer in range(num_layers)]
        attributes = [integer(stage) for stage in stages]
        for op, layer in zip(flow.ops, layers, strict=True):
            if layer is not None:
                op.attributes[STAGE] = attributes[layer]
        of_ops = [None if layer is None else stages[layer] for layer in layers]
        module.operation.attributes[NUM_STAGES] = integer(len(starts))
        if self.first_devices.strip():
            module.operation.attributes[FIRST_DEVICES] = ir.DenseI64ArrayAttr.get(self._first_devices(len(starts)))
        if read_first_devices(module) is None:  # else a search has weighed the stages
            warn_of_uneven_stages(flow, op_seconds, of_ops, devices, bool(argument_pinned_stages(main)), ctx)
        if words := words_of_layers(parse_remat(self.remat), num_layers):
            module.operation.attributes[REMAT] = ir.ArrayAttr.get([ir.StringAttr.get(word) for word in words])
        ctx.keep(flow)
        ctx.keep(times)
        ctx.count("cut-bytes", sum(crossing[start] for start in starts[1:]))

    def _meshes(self, num_stages: int) -> tuple[MeshAxes, ...]:
        one_device: MeshAxes = (("data", 1),)
        return meshes_of_stages(parse_meshes(self.mesh) if self.mesh.strip() else (one_device,), num_stages)

    def _balanced(
        self, seconds: list[float], crossing: list[int], devices: list[int], main: ir.Operation, ctx: PassContext
    ) -> list[int] | None:
        if len(devices) > len(seconds):
            ctx.error(
                main,
                f"cannot make {len(devices)} stages of {len(seconds)} layer{'s' * (len(seconds) > 1)}",
                why="a stage has at least one layer",
                fix=f"group-layers with num-layers={len(devices)} or more, or ask for at most {len(seconds)} stages",
            )
            return None
        return list(layer_partitioning.balance(seconds, crossing, devices))


def _layer_costs(
    flow: MainDataflow, seconds: Sequence[float], roles: list[str], layers: list[int | None], num_layers: int
) -> tuple[list[float], list[int]]:
    """Seconds of each layer in a step, and the bytes across each layer's start in the forward and backward phase.

    Of the values that cross only those count that depend on the batch: the others are cloned, or sent once.
    """
    total = [0.0] * num_layers
    change = [0] * (num_layers + 1)
    tainted = [role == "batch" for role in roles] + [False] * (len(flow.values) - flow.num_arguments)
    phases, sizes, users = flow.phases, flow.sizes, flow.users()
    for index, own in enumerate(layers):
        if own is None:
            continue
        total[own] += seconds[index]
        if phases[index] == UPDATE or not any(tainted[value] for value in flow.operands[index]):
            continue
        for value in flow.results[index]:
            tainted[value] = True
            readers = [layers[user] for user in users[value] if phases[user] == phases[index]]
            ends = [own, *(layer for layer in readers if layer is not None)]
            change[min(ends) + 1] += sizes[value]
            change[max(ends) + 1] -= sizes[value]
    return total, list(itertools.accumulate(change[:num_layers]))
