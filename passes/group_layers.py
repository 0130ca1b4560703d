"""``group-layers``: every op gets the layer that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    LAYER,
    NUM_LAYERS,
    UPDATE,
    integer,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function
from bactrian.passes.stages.forward_cut import cut_forward
from bactrian.passes.stages.layer_graph import LayeredProgram
from bactrian.passes.stages.op_times import OpTimes
from bactrian.passes.stages.placement_by_forward import place_by_forward


@dataclass(frozen=True)
class GroupLayers(Pass):
    """Group the program into layers: forward by predicted time and cut bytes, the rest to what it reads.

    The forward ops are cut into ``num-layers`` contiguous groups, where the fewest bytes cross, so that a step takes
    about equally long on each: the roofline time of its forward ops, and of the backward and update ops that go with
    them, on a device of ``cluster``. What every stage will compute for itself (a mask of positions in the batch) crosses
    no cut. Where blocks of the model repeat, cuts are at the same place of each, if that costs no bytes and leaves the layers about
    as even: then layers are equal, and with ``most-layers`` there is one for each block. A part that `jax.checkpoint` computes again is cut only if that makes the slowest layer much faster. If
    the program has stage boundaries, cuts are made only there; the boundaries are removed. Backward and update ops may
    stand anywhere, so they go where the bytes times the layers that they travel are least: a residual is free
    from the layer that makes it to the last that reads it in the forward phase, an argument is free where the forward
    phase reads it, an optimizer's state goes along with what updates it. What depends on neither the batch nor a large
    argument (constants, masks, random bits) is cheap to clone later and goes to its lowest reader (in the backward
    phase to its highest).

    If another program has pinned arguments to stages (``bactrian.pinned_stages``) and there are as many layers, each
    layer is a stage: a forward op that reads such arguments is put on a stage that holds them all, and backward and
    update ops are drawn there. If there is less work than stages, some have no op. Only arguments of at most ``small-bytes`` may be read elsewhere, if there is no other
    way.

    Requires: ``bactrian.phase`` on every op (``infer-phases``).
    Ensures: ``bactrian.num_layers`` on the module and ``bactrian.layer`` on every op with a phase. Forward edges never
    go to a lower layer, backward edges never to a higher one. No stage boundary is left.

    Input:

    ```mlir
    func.func public @main(%v: tensor<16x16xf32> {bactrian.role = "state"},
        %w: tensor<16x16xf32> {bactrian.role = "state"}, %x: tensor<4x16xf32> {bactrian.role = "batch"})
        -> tensor<4x16xf32> {
      %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"}
        : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
      %m = stablehlo.custom_call @bactrian.stage_boundary(%y) {bactrian.phase = "forward"}
        : (tensor<4x16xf32>) -> tensor<4x16xf32>
      %z = stablehlo.dot_general %m, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"}
        : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
      return %z : tensor<4x16xf32>
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_layers = 2 : i64} {
      func.func public @main(%v: tensor<16x16xf32> {bactrian.role = "state"},
          %w: tensor<16x16xf32> {bactrian.role = "state"}, %x: tensor<4x16xf32> {bactrian.role = "batch"})
          -> tensor<4x16xf32> {
        %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0]
          {bactrian.layer = 0 : i64, bactrian.phase = "forward"}
          : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
        %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0]
          {bactrian.layer = 1 : i64, bactrian.phase = "forward"}
          : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
        return %z : tensor<4x16xf32>
      }
    }
    ```

    The boundary is where the second layer begins, and it is gone.
    """

    name: ClassVar[str] = "group-layers"
    summary: ClassVar[str] = "group the ops into layers of equal predicted time with small cuts"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat", "typed", "marked", "with-phases")
    ensures: ClassVar[tuple[str, ...]] = ("phased", "layered")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("cut-bytes", "bytes of forward values, summed over the cuts that each crosses"),
        Statistic("free", "ops that depend on neither the batch nor a large argument"),
        Statistic("placed", "backward and update ops placed by what they read"),
        Statistic("markers", "stage boundaries removed"),
    )

    num_layers: int = option(0, help="how many layers to make; 0: one more than there are stage boundaries")
    most_layers: int = option(
        0, help="if num-layers is 0: find how many, one for each block that repeats, and no more than this"
    )
    num_stages: int = option(0, help="stages that will be made of the layers, for errors to name; 0: not known")
    epsilon: float = option(0.1, help="by how much a layer's predicted time may exceed an even share")
    cluster: str = option(
        "", help="TOML file of the devices that time is predicted for; the cores of this host if empty"
    )
    small_bytes: int = option(256, help="an argument of at most this many bytes is read anywhere for free")

    def check_options(self) -> None:
        """Neither a number of layers nor the slack is negative."""
        for option_name, value in (("num-layers", self.num_layers), ("most-layers", self.most_layers)):
            if value < 0:
                raise ConfigError(f"option {option_name} of {self.name} is {value}, must not be negative")
        if not 0 <= self.epsilon <= 1000:
            raise ConfigError(f"option epsilon of {self.name} is {self.epsilon}, must be from 0 to 1000")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Cut the forward ops, place all others, write the layers."""
        program = LayeredProgram.of(module, MainDataflow.kept_or_read(module, ctx), self.small_bytes)
        times = OpTimes.of(module, self.cluster, ctx.remark)
        main = main_function(module)
        layers = cut_forward(
            program, times.seconds, self.num_layers, self.num_stages, self.epsilon, self.most_layers, main, ctx
        )
        if layers is None:
            return
        num_layers = max(self.num_layers, 1 + max((layer for layer in layers if layer is not None), default=0))
        _place_free(program, layers, FORWARD)
        pinned = program.pinned if program.pinned is not None and program.pinned.num_stages == num_layers else None
        placed = place_by_forward(program, pinned, layers, num_layers)
        for phase in (UPDATE, BACKWARD):
            _place_free(program, layers, phase)
        attributes = [integer(layer) for layer in range(num_layers)]
        for index, op in enumerate(program.flow.ops):
            layer = layers[index]
            if layer is not None and not program.marker[index]:
                op.attributes[LAYER] = attributes[layer]
        module.operation.attributes[NUM_LAYERS] = integer(num_layers)
        _remove_markers(program)
        if not any(program.marker):
            ctx.keep(program.flow)
            ctx.keep(times)
        ctx.count("free", sum(program.free))
        ctx.count("placed", placed)
        ctx.count("markers", sum(program.marker))


def _place_free(program: LayeredProgram, layers: list[int | None], phase: str) -> None:
    """Free ops go to their lowest reader of the same phase (backward: highest), else to the lowest of all."""
    choose = max if phase == BACKWARD else min
    for index in range(len(layers) - 1, -1, -1):
        if program.phases[index] != phase or not program.free[index]:
            continue
        readers = [reader for value in program.flow.results[index] for reader in program.readers[value]]
        own = [layer for r in readers if program.phases[r] == phase and (layer := layers[r]) is not None]
        others = [layer for r in readers if (layer := layers[r]) is not None]
        layers[index] = choose(own) if own else min(others, default=0)


def _remove_markers(program: LayeredProgram) -> None:
    """Replace every stage boundary by what it passes on."""
    for index, op in enumerate(program.flow.ops):
        if program.marker[index]:
            for result, operand in zip(op.results, op.operands, strict=True):
                result.replace_all_uses_with(operand)
            op.erase()
