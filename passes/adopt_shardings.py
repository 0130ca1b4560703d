"""``adopt-shardings``: put user-specified shardings onto one mesh with the axes of the stages' meshes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.base import Locatable, Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import argument_attributes, result_attributes, result_updates
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, erase_meshes, make_user_mesh, mesh_axes
from bactrian.passes.ir.regions import (
    body,
    custom_call_target,
    main_function,
    nested_operations,
    set_operand,
    terminator,
)
from bactrian.passes.machine.spec import MeshAxes, axes_text, num_devices, parse_meshes
from bactrian.passes.sharding.user_shardings import CONSTRAINT

_STAGE = re.compile(r"stage\d+")


@dataclass(frozen=True)
class AdoptShardings(Pass):
    """Put user-specified shardings onto one mesh ``@user``, by the names of the axes of the stages' meshes.

    ``with_sharding_constraint``, ``in_shardings``, ``out_shardings`` and arguments that are sharded name the axes of
    the user's own mesh. Those of more than one device must be axes of the stages' meshes, of the same sizes; these may
    have others. The shardings then name ``@user``, which has all axes of the stages' meshes: which stage a value
    belongs to is not known yet. ``solve-shardings`` reads the axes by name on the mesh of each stage, where an axis
    that this mesh does not have shards nothing. A dim that is left open stays open.

    An argument that is only read through a constraint has that sharding itself, in every stage that reads it, and so
    has state whose next value is constrained, unless it is asked for in another one. Every other constraint stays where
    it is. On stages of one device a constraint means nothing, and is dropped with a remark.

    Requires: one flat function `@main`.
    Ensures: every ``sdy.sharding`` of an argument and every ``sdy.sharding_constraint`` is over ``@user``; no meshes
    but this one and those of stages.

    Input:

    ```mlir
    sdy.mesh @stage0 = <["data"=2, "model"=4]>
    sdy.mesh @mesh = <["model"=4, "replica"=1]>
    func.func public @main(%arg0: tensor<8x8xf32>) -> tensor<8x8xf32> {
      %0 = sdy.sharding_constraint %arg0 <@mesh, [{"model"}, {"replica"}]> : tensor<8x8xf32>
      %1 = stablehlo.negate %0 : tensor<8x8xf32>
      return %1 : tensor<8x8xf32>
    }
    ```

    Output:

    ```mlir
    sdy.mesh @user = <["data"=2, "model"=4]>
    sdy.mesh @stage0 = <["data"=2, "model"=4]>
    func.func public @main(%arg0: tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@user, [{"model"}, {}]>})
        -> tensor<8x8xf32> {
      %0 = stablehlo.negate %arg0 : tensor<8x8xf32>
      return %0 : tensor<8x8xf32>
    }
    ```

    The argument is sharded over the axis of its name, in the order of the stages' axes.
    """

    name: ClassVar[str] = "adopt-shardings"
    summary: ClassVar[str] = "put user-specified shardings onto one mesh, by the axes of the stages' meshes"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat")
    ensures: ClassVar[tuple[str, ...]] = ("adopted",)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("arguments", "arguments with a specified sharding"),
        Statistic("constraints", "constraints that stay"),
        Statistic("dropped", "constraints that mean nothing here, or say again what is given"),
    )

    mesh: str = option(
        "",
        help='the mesh of all stages, as in "data=2,model=4", or of each, as in "data=2;data=4"; '
        "by default those in the module",
    )

    def check_options(self) -> None:
        """Axes must have names and sizes."""
        if self.mesh.strip():
            parse_meshes(self.mesh)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Rename, refuse or drop; then arguments."""
        main = main_function(module)
        meshes = mesh_axes(module)
        known = {name: axes for name, axes in meshes.items() if _STAGE.fullmatch(name)}
        stages = parse_meshes(self.mesh) if self.mesh.strip() else tuple(known.values())
        is_wide = any(num_devices(axes) > 1 for axes in stages)
        if not meshes and not is_wide:  # without a mesh there are no shardings: most programs need no look
            return
        foreign = meshes.keys() - known.keys()
        program = _Program(main, ctx)
        if not program.is_any and not foreign:
            return
        if is_wide:
            if self.mesh.strip():
                self._check_known(stages, known)
            program.adopt(_Axes(stages, meshes, ctx))
            ctx.fail_if_errors()
            program.give_arguments()
        else:
            program.drop()
        erase_meshes(module, foreign)
        if is_wide and program.is_any:
            make_user_mesh(module, stages)

    def _check_known(self, stages: tuple[MeshAxes, ...], known: Mapping[str, MeshAxes]) -> None:
        """Refuse other meshes than those of the module's stages, where it has them already.

        Raises:
            ConfigError: they are more or fewer, or differ.
        """
        if known and len(stages) not in (1, len(known)):
            raise ConfigError(
                f"mesh is {self.mesh}, but the module has {len(known)} stage{'s' * (len(known) > 1)}",
                fix="give one mesh for all stages, or one for each",
            )
        for number, axes in enumerate(stages if len(stages) > 1 else stages * len(known)):
            own = known.get(f"stage{number}", axes)
            if own != axes:
                raise ConfigError(f"mesh is {self.mesh}, but the module has @stage{number} = {axes_text(own)}")


class _Axes:
    """Translates shardings to the axes of the stages."""

    def __init__(self, stages: Sequence[MeshAxes], meshes: dict[str, MeshAxes], ctx: PassContext) -> None:
        self._stages, self._meshes, self._ctx = tuple(dict.fromkeys(stages)), meshes, ctx
        self._sizes: dict[str, set[int]] = {}
        for name, size in chain.from_iterable(self._stages):
            if size > 1:  # an axis of one device shards nothing
                self._sizes.setdefault(name, set()).add(size)
        self._refused = set[MeshAxes]()

    def adopted(self, sharding: ir.Attribute, where: Locatable, what: str) -> ir.Attribute | None:
        """The same sharding over ``@user``; None where it means nothing, and where there was an error.

        Args:
            sharding: ``#sdy.sharding``.
            where: who asked for it.
            what: is asked for, for errors.
        """
        tensor = sdy.TensorShardingAttr(sharding)
        reference = tensor.mesh_or_ref
        if not isinstance(reference, ir.FlatSymbolRefAttr):
            self._ctx.error(where, f"{what} has a mesh of its own: {sharding}", fix="name an sdy.mesh of the module")
            return None
        mesh = self._meshes[reference.value]
        if reason := self._difference(mesh):
            if mesh in self._refused:  # once for each
                return None
            self._refused.add(mesh)
            self._ctx.error(
                where,
                f"{what} is over a mesh {axes_text(mesh)}, but {self._stages_text()}",
                why=reason,
                fix="call and size the axes of both alike (parallelize's mesh may have more), or take the sharding out",
            )
            return None
        if num_devices(mesh) == 1:
            return None
        if tensor.replicated_axes or tensor.unreduced_axes:
            self._ctx.error(
                where,
                f"{what} has replicated or unreduced axes: {sharding}",
                fix="give only the axes that each dim is sharded over",
            )
            return None
        dims = [sdy.DimensionShardingAttr(dim) for dim in tensor.dimension_shardings]
        if any(sdy.AxisRefAttr(axis).sub_axis_info is not None for dim in dims for axis in dim.axes):
            self._ctx.error(where, f"{what} is over a part of an axis: {sharding}", fix="make that an axis of the mesh")
            return None
        sizes = dict(mesh)
        return sdy.TensorShardingAttr.get(USER_MESH, [self._dim(dim, sizes) for dim in dims])

    def _stages_text(self) -> str:
        texts = [axes_text(axes) for axes in self._stages]
        return (
            f"each stage has the mesh {texts[0]}" if len(texts) == 1 else f"stages have the meshes {'; '.join(texts)}"
        )

    def _difference(self, mesh: MeshAxes) -> str:
        for name, size in mesh:
            if size == 1:
                continue
            own = self._sizes.get(name)
            if not own:
                return f"no axis of a stage's mesh is called {name}"
            if others := sorted(own - {size}):
                return f"axis {name} has size {size} there, and {others[0]} in a stage's mesh"
        return ""

    def _dim(self, dim: sdy.DimensionShardingAttr, sizes: Mapping[str, int]) -> ir.Attribute:
        names = [sdy.AxisRefAttr(axis).name for axis in dim.axes]
        kept = [sdy.AxisRefAttr.get(name) for name in names if sizes[name] > 1]  # one device shards nothing
        return sdy.DimensionShardingAttr.get(kept, is_closed=dim.is_closed)


class _Program:
    """``@main`` and what its user asked for."""

    def __init__(self, main: ir.Operation, ctx: PassContext) -> None:
        self._main, self._ctx = main, ctx
        ops = nested_operations(main)
        self._constraints = [op for op in ops if op.name == CONSTRAINT]
        self._strange = [
            op for op in ops if op.name == "sdy.manual_computation" or custom_call_target(op) == "Sharding"
        ]
        self._arguments = argument_attributes(main)
        self._results = result_attributes(main)

    @property
    def is_any(self) -> bool:
        """Whether anything was asked for."""
        given = any(SHARDING in entry for entry in (*self._arguments, *self._results))
        return given or bool(self._constraints or self._strange)

    def drop(self) -> None:
        """Forget all shardings."""
        self._refuse("sdy.manual_computation")
        count = len(self._constraints) + sum(SHARDING in entry for entry in self._arguments)
        if count:
            where = self._constraints[0] if self._constraints else self._main
            self._ctx.remark(
                where, f"{count} sharding constraint{'s' * (count > 1)} dropped: each stage has one device"
            )
        for op in self._constraints:
            self._erase(op)
        for entry in (*self._arguments, *self._results):
            entry.pop(SHARDING, None)
        self._write()

    def adopt(self, axes: _Axes) -> None:
        """Put every sharding onto ``@user``; constraints that say nothing are dropped."""
        self._refuse("sdy.manual_computation", "stablehlo.custom_call")
        for number, entry in enumerate(self._results):
            if SHARDING in entry:  # of the value that is returned
                end = terminator(self._main)
                value = end.operands[number]
                with ir.InsertionPoint(end):
                    made = ir.Operation.create(
                        CONSTRAINT, [value.type], [value], {"sharding": entry.pop(SHARDING)}, loc=value.location
                    )
                set_operand(end, number, made.results[0])
                self._constraints.append(made)
        for value, entry in zip(body(self._main).arguments, self._arguments, strict=True):
            if SHARDING in entry:
                found = axes.adopted(entry.pop(SHARDING), value, "the sharding of an argument")
                if found is not None:
                    entry[SHARDING] = found
        kept = list[ir.Operation]()
        for op in self._constraints:
            found = axes.adopted(op.attributes["sharding"], op, "a sharding constraint")
            if found is None or not _is_said(found):
                self._erase(op)
            else:
                op.attributes["sharding"] = found
                kept.append(op)
        self._constraints = kept

    def give_arguments(self) -> None:
        """Give arguments the shardings of their constraints; drop constraints that say nothing new."""
        for value, entry in zip(body(self._main).arguments, self._arguments, strict=True):
            readers = [use.owner.operation for use in value.uses]
            if SHARDING not in entry and readers and all(self._is_closed(op) for op in readers):
                asked = list({op.attributes["sharding"] for op in readers})
                if len(asked) == 1:
                    entry[SHARDING] = asked[0]
        end = terminator(self._main)
        for position, updated in enumerate(result_updates(self._main)):
            owner = end.operands[position].owner
            if updated is not None and SHARDING not in self._arguments[updated] and self._is_closed(owner):
                self._arguments[updated][SHARDING] = owner.operation.attributes["sharding"]
        kept = list[ir.Operation]()
        for op in self._constraints:
            known = self._known(op.operands[0])
            if known is not None and op.attributes["sharding"] == known:
                self._erase(op)
            else:
                kept.append(op)
        self._constraints = kept
        self._ctx.count("constraints", len(kept))
        self._ctx.count("arguments", sum(SHARDING in entry for entry in self._arguments))
        self._write()

    def _is_closed(self, op: object) -> bool:
        """Whether an op is a constraint at the top of the step that leaves nothing open."""
        if isinstance(op, ir.Block):
            return False
        assert isinstance(op, (ir.Operation, ir.OpView))
        operation = op.operation
        if operation.name != CONSTRAINT or operation.parent != self._main:
            return False
        dims = sdy.TensorShardingAttr(operation.attributes["sharding"]).dimension_shardings
        return all(sdy.DimensionShardingAttr(dim).is_closed for dim in dims)

    def _known(self, value: ir.Value) -> ir.Attribute | None:
        """The sharding that a value is known to have: of an argument, or of what a constraint makes."""
        owner = value.owner
        if isinstance(owner, ir.Block):
            number = ir.BlockArgument(value).arg_number
            return self._arguments[number].get(SHARDING) if owner == body(self._main) else None
        return owner.operation.attributes["sharding"] if owner.operation.name == CONSTRAINT else None

    def _refuse(self, *names: str) -> None:
        for op in self._strange:
            if op.name not in names:
                continue
            if op.name == "sdy.manual_computation":
                self._ctx.error(
                    op,
                    "shard_map is not supported yet",
                    why="its body is written for the shards of one mesh",
                    fix="write it for whole arrays, and constrain their shardings with with_sharding_constraint",
                )
            else:
                self._ctx.error(
                    op,
                    "a sharding constraint is not written in Shardy's dialect",
                    fix="switch jax_use_shardy_partitioner on",
                )
        self._ctx.fail_if_errors()

    def _erase(self, op: ir.Operation) -> None:
        op.results[0].replace_all_uses_with(op.operands[0])
        op.erase()
        self._ctx.count("dropped")

    def _write(self) -> None:
        for name, entries in (("arg_attrs", self._arguments), ("res_attrs", self._results)):
            if any(entries) or name in self._main.attributes:
                self._main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])


def _is_said(sharding: ir.Attribute) -> bool:
    """Whether a sharding says anything: not if all dims are open, without an axis."""
    dims: Sequence[ir.Attribute] = sdy.TensorShardingAttr(sharding).dimension_shardings
    found = [sdy.DimensionShardingAttr(dim) for dim in dims]
    return not found or any(dim.is_closed or len(dim.axes) for dim in found)
