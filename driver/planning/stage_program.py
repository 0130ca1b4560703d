"""From a captured program to a plan and its staged module: the pass pipeline, and what it predicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePath

from jaxlib.mlir import ir

from bactrian.driver.planning.extract import extract
from bactrian.driver.planning.infeasible_core import with_conflict
from bactrian.driver.planning.memory_refinement import Cut, Fitted, fit, is_fitting, solved_again
from bactrian.driver.planning.plan_shardings import (
    Layout,
    as_before,
    plan_layouts,
    refuse_moved,
    refuse_overruled,
    write_layouts,
)
from bactrian.passes import pipelines
from bactrian.passes.frame.diagnostics import Diagnostic
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.location import name_stack, user_place
from bactrian.passes.frame.pipeline import Report, run_pipeline
from bactrian.passes.ir.main_dataflow import Dataflow, body, integer_attribute, main_function, phase_of, stage_of
from bactrian.passes.ir.meshes import num_devices
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.machine.device import CPU_CORE, Device, OpCost
from bactrian.passes.pipelines import Steps
from bactrian.passes.plan.schema import Axes, LayerPlan, Plan, StagePlan, axes_words
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.passes.schedules.schedule import peak_in_flight
from bactrian.passes.sharding.solve_snapshot import before_solving
from bactrian.runtime.staged_program import StagedProgram

_DEVICES: dict[str, Device] = {"cpu": CPU_CORE}


@dataclass(frozen=True)
class Decisions:
    """What is decided before any pass runs.

    Attributes:
        num_stages, num_layers: how many.
        first_layers: the first layer of every stage, if given.
        donate: whether the update reuses the buffers of the old state.
        mesh: names and sizes of the axes of every stage's mesh.
        cluster: the file that describes the machines, "" for the cores of this host.
        strategy: how layouts are chosen, as ``solve-shardings`` knows it.
        compare: whether known plans are looked at too.
        time_limit: seconds for the choice of layouts.
    """

    num_stages: int
    num_layers: int
    first_layers: tuple[int, ...] = ()
    donate: bool = True
    mesh: Axes = (("data", 1),)
    cluster: str = ""
    strategy: str = "auto"
    compare: bool = False
    time_limit: float = 60.0

    @classmethod
    def of_plan(cls, plan: Plan, donate: bool, cluster: str = "") -> Decisions:
        """The decisions of an existing plan."""
        firsts = tuple(stage.first_layer for stage in plan.stages)
        sharding = plan.stages[0].sharding
        strategy = "auto" if sharding is None else sharding.strategy
        return cls(plan.num_stages, plan.num_layers, firsts, donate, plan.stages[0].mesh, cluster, strategy)

    @property
    def is_wide(self) -> bool:
        """Whether stages have several devices."""
        return num_devices(self.mesh) > 1

    @property
    def mesh_text(self) -> str:
        """The mesh as passes take it; nothing where stages have one device."""
        return axes_words(self.mesh) if self.is_wide else ""

    def assigning(self) -> Steps:
        """The passes up to ``assign-stages``."""
        boundaries = ",".join(map(str, self.first_layers))
        imported = pipelines.import_step(self.mesh_text)
        return (*imported, *pipelines.form_stages(self.num_stages, self.num_layers, boundaries, self.mesh_text))

    def localizing(self) -> Steps:
        """The passes from there to what ``solve-shardings`` reads."""
        return (*pipelines.localize_stages(), *(pipelines.prepare_shardings() if self.is_wide else ()))

    def staging(self, memory_bytes: int = 0) -> Steps:
        """The passes from there to the scheduled module, with layouts that hold less than some bytes of a device; 0 for
        what the cluster says."""
        sharded: Steps = ()
        if self.is_wide:
            sharded = pipelines.shard_stages(self.cluster, memory_bytes, self.time_limit, self.strategy, self.compare)
        return (*sharded, *pipelines.emit_stages(self.donate))


@dataclass
class Staged:
    """A planned program: the plan, the scheduled module, and the same as plain data.

    ``unsolved`` is the module as it was before layouts were chosen; None where there was nothing to choose.
    """

    plan: Plan
    module: ir.Module
    donate: bool
    diagnostics: tuple[Diagnostic, ...] = ()
    unsolved: ir.Operation | None = None

    @cached_property
    def program(self) -> StagedProgram:
        """The staged program as the runtime reads it."""
        return extract(self.module)

    @cached_property
    def text(self) -> str:
        """The staged module as text, without locations."""
        return str(self.module)

    def save(self, directory: str | Path) -> None:
        """Write ``plan.json`` and ``staged.mlir`` into a folder; on a mesh, ``solve.mlir`` too, to be explained."""
        unsolved = None if self.unsolved is None else str(self.unsolved.get_asm(enable_debug_info=True))
        self.plan.save(directory, self.text, unsolved)


def stage_program(
    module: ir.Module,
    decisions: Decisions,
    *,
    fingerprint: str,
    platform: str,
    schedule: str,
    num_microbatches: int,
    plan: Plan | None = None,
    paths: Sequence[str] = (),
    layouts: Mapping[int, Layout] | None = None,
    reproducer_dir: str | None = None,
) -> Staged:
    """Run the passes on a captured module (which is consumed) and say what is predicted of the outcome.

    Args:
        plan: an existing plan to apply; its predictions are replaced by those of this run.
        paths: of the arguments, for people.
        layouts: of arguments on the mesh of the one stage, where they are given: the axes of each dim.
        reproducer_dir: where a failing pass writes its reproducer.
    """
    first = run_pipeline(module, decisions.assigning(), reproducer_dir=reproducer_dir)
    sources = dict[int, str]()
    with module.context:
        ops = _measured_ops(module, first.kept.get(Dataflow))
        work = _measure(ops)
        layers = _name_layers(ops, decisions.num_layers)
        first_layers = _first_layers(ops, decisions.num_stages)
        if decisions.is_wide:
            sources = _write_given(module, plan, layouts or {}, paths)
    second = run_pipeline(module, decisions.localizing(), reproducer_dir=reproducer_dir, kept=first.kept)
    unsolved = None
    if decisions.is_wide:
        with module.context:
            unsolved = before_solving(module, fingerprint, decisions.cluster, decisions.strategy, sources)

    def cut(whole: ir.Module, limit: int | None = None) -> Report:
        kept = second.kept if whole is module else None
        return run_pipeline(whole, decisions.staging(limit or 0), reproducer_dir=reproducer_dir, kept=kept)

    fitted = _fitted(module, unsolved, cut, paths)
    module, program, shardings = fitted.module, fitted.program, fitted.shardings
    device = _DEVICES.get(platform)
    if plan is not None:
        shardings = tuple(as_before(new, stage.sharding) for new, stage in zip(shardings, plan.stages, strict=False))
    stages = tuple(
        _stage_plan(
            program,
            stage,
            first_layers,
            decisions.num_layers,
            work.get(stage, _Work()),
            device,
            num_microbatches,
            shardings[stage] if shardings else None,
        )
        for stage in range(decisions.num_stages)
    )
    made = Plan(
        num_stages=decisions.num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        num_layers=decisions.num_layers,
        stages=stages,
        layers=layers,
        fingerprint=fingerprint,
        platform=platform,
        predicted_step_seconds=_step_seconds(work, num_microbatches, device)
        if not shardings
        else max(s.seconds for s in shardings) * (num_microbatches + decisions.num_stages - 1) / num_microbatches,
        peak_memory_bytes=max((s.device_memory_bytes or 0 for s in stages), default=0),
        options=plan.options if plan is not None else (),
    )
    diagnostics = (*first.diagnostics, *second.diagnostics, *fitted.report.diagnostics)
    return Staged(made, module, decisions.donate, diagnostics, unsolved)


def _write_given(
    module: ir.Module, plan: Plan | None, placed: Mapping[int, Layout], paths: Sequence[str]
) -> dict[int, str]:
    """Write the layouts that a plan or another step has given to arguments; returns who gave each, by the argument's number."""
    ranks = [len(ir.RankedTensorType(value.type).shape) for value in body(main_function(module)).arguments]
    given = {} if plan is None else plan_layouts(plan, paths, ranks)
    refuse_moved(given, placed, paths)
    refuse_overruled(module, {**given, **placed}, paths)
    write_layouts(module, {**given, **placed})
    return dict.fromkeys(given, "the plan that was applied") | dict.fromkeys(placed, "another step")


def _fitted(module: ir.Module, unsolved: ir.Operation | None, cut: Cut, paths: Sequence[str]) -> Fitted:
    """The program in stages. Where nothing fits, the error names the given layouts that are to blame."""
    try:
        return fit(module, None if unsolved is None else partial(solved_again, unsolved), cut, paths)
    except InfeasiblePlanError as error:
        if unsolved is None:
            raise
        with module.context:
            raise with_conflict(error, unsolved, partial(is_fitting, cut=cut)) from error


@dataclass
class _Work:
    """Flops and roofline seconds of a stage by phase; seconds of one microbatch (update: of one step)."""

    flops: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, phase: str, cost: OpCost) -> None:
        """Count one op."""
        self.flops[phase] = self.flops.get(phase, 0.0) + cost.flops
        self.seconds[phase] = self.seconds.get(phase, 0.0) + CPU_CORE.seconds(cost)

    @property
    def microbatch_seconds(self) -> float:
        """Forward and backward of one microbatch."""
        return self.seconds.get("forward", 0.0) + self.seconds.get("backward", 0.0)


@dataclass(frozen=True, slots=True)
class _MeasuredOp:
    """An op that has a place, as ``assign-stages`` left it."""

    op: ir.Operation
    phase: str
    stage: int
    layer: int | None
    cost: OpCost


def _measured_ops(module: ir.Module, flow: Dataflow | None) -> list[_MeasuredOp]:
    model = CostModel()
    found: list[_MeasuredOp] = []
    for op in (flow or Dataflow.of(main_function(module))).ops:
        phase, stage = phase_of(op), stage_of(op)
        if phase is not None and stage is not None:
            found.append(_MeasuredOp(op, phase, stage, integer_attribute(op, "bactrian.layer"), model.cost(op)))
    return found


def _measure(ops: list[_MeasuredOp]) -> dict[int, _Work]:
    work: dict[int, _Work] = {}
    for op in ops:
        work.setdefault(op.stage, _Work()).add(op.phase, op.cost)
    return work


def _step_seconds(work: dict[int, _Work], num_microbatches: int, device: Device | None) -> float | None:
    """Sum of the stages' time per microbatch, (m - 1) times the slowest, and the slowest update."""
    if device is None:
        return None
    per_microbatch = [stage.microbatch_seconds for stage in work.values()]
    update = max((stage.seconds.get("update", 0.0) for stage in work.values()), default=0.0)
    return sum(per_microbatch) + (num_microbatches - 1) * max(per_microbatch, default=0.0) + update


def _first_layers(ops: list[_MeasuredOp], num_stages: int) -> list[int]:
    """The first layer of every stage."""
    first: dict[int, int] = {}
    for op in ops:
        if op.layer is not None:
            first[op.stage] = min(op.layer, first.get(op.stage, op.layer))
    found = [first[stage] for stage in range(num_stages)]
    return [0, *found[1:]]


_WRAPPER = re.compile(r"^(?!jit\()[\w.-]+\((.*)\)$")


def _module_of(stack: str) -> str:
    """The user's module in a name stack: ``jit(step)/jvp(GPT)/block_1/attn/dot_general`` is in ``block_1``."""
    names: list[str] = []
    for part in stack.split("/")[:-1]:
        while match := _WRAPPER.match(part):
            part = match.group(1)
        if (
            part
            and "(" not in part
            and part not in ("checkpoint", "rematted_computation", "closed_call", "while", "body")
        ):
            names.append(part)
    return names[1] if len(names) > 1 else names[0] if names else ""


def _name_layers(ops: list[_MeasuredOp], num_layers: int) -> tuple[LayerPlan, ...]:
    """Each layer's modules, and the user's line of its first op that does arithmetic."""
    first: dict[int, str] = {}
    modules: dict[int, dict[str, None]] = {layer: {} for layer in range(num_layers)}
    for measured in ops:
        if measured.phase != "forward" or measured.cost.flops == 0:
            continue
        op, layer = measured.op, measured.layer or 0
        if layer not in first:
            first[layer] = _first_op(op)
        name = _module_of(name_stack(op.location))
        if name:
            modules[layer][name] = None
    return tuple(LayerPlan(layer, first.get(layer, ""), tuple(modules[layer])) for layer in range(num_layers))


def _first_op(op: ir.Operation) -> str:
    """``stablehlo.dot_general at train.py:12``: without the folder, so that plans do not depend on it."""
    place = user_place(op.location)
    return op.name if place is None else f"{op.name} at {PurePath(place.file).name}:{place.line}"


def _stage_plan(
    program: StagedProgram,
    stage: int,
    first_layers: list[int],
    num_layers: int,
    work: _Work,
    device: Device | None,
    num_microbatches: int,
    sharding: ShardingPlan | None,
) -> StagePlan:
    last = first_layers[stage + 1] - 1 if stage + 1 < len(first_layers) else num_layers - 1
    traffic = _Traffic(program, stage)
    parameters = traffic.state_values(lambda phase: phase != "update")
    per_step = work.microbatch_seconds * num_microbatches + work.seconds.get("update", 0.0)
    return StagePlan(
        stage=stage,
        first_layer=first_layers[stage],
        last_layer=last,
        forward_flops=round(work.flops.get("forward", 0.0)),
        backward_flops=round(work.flops.get("backward", 0.0)),
        num_parameters=sum(_elements(program.values[value].shape) for value in parameters),
        parameter_bytes=sum(program.values[value].nbytes for value in parameters),
        state_bytes=sum(program.values[v].nbytes for v in traffic.state_values(lambda phase: True)),
        mesh=program.mesh(stage),
        activation_bytes=traffic.activation_bytes(),
        microbatches_in_flight=peak_in_flight(program.order[stage]),
        sent_bytes_forward=traffic.sent_bytes(("forward",)),
        sent_bytes_backward=traffic.sent_bytes(("backward", "forward_backward")),
        update_sent_bytes=traffic.sent_bytes(None),
        predicted_seconds=sharding.seconds if sharding is not None else per_step if device is not None else None,
        sharding=sharding,
    )


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


class _Traffic:
    """What one stage keeps and sends, read off the staged program."""

    def __init__(self, program: StagedProgram, stage: int) -> None:
        self._program, self._stage = program, stage
        self._phase_of = {value: call.phase for call in program.calls for value in call.outputs}
        trains = any(call.phase in ("backward", "forward_backward") for call in program.calls)
        self._roles = ("state",) if trains else ("state", "constant")
        self._calls = [call for call in program.calls if call.stage == stage]

    def state_values(self, phase_matches: Callable[[str], bool]) -> list[int]:
        """State pieces that functions of matching phases read; read-only arguments, too, if nothing is trained."""
        state = {piece.value for piece in self._program.arguments if piece.role in self._roles}
        read = {value for call in self._calls if phase_matches(call.phase) for value in call.inputs}
        here = {value for value in state if self._program.values[value].stage == self._stage}
        return sorted(read & here)

    def activation_bytes(self) -> int:
        """Bytes that a microbatch leaves between its forward and its backward on this stage."""
        batch = {piece.value for piece in self._program.arguments}
        carried = {call.inputs[position] for call in self._calls for position, _ in call.carries}
        kept: set[int] = set()
        for call in self._calls:
            if call.phase == "backward":
                kept |= {v for v in call.inputs if v >= 0 and v not in batch and v not in carried}
        made_or_read: set[int] = set()
        for call in self._calls:
            if call.phase == "forward":
                made_or_read |= {*call.inputs, *call.outputs}
        return sum(self._program.values[value].nbytes for value in kept & made_or_read)

    def sent_bytes(self, phases: tuple[str, ...] | None) -> int:
        """Bytes sent by functions of the given phases per microbatch, or (None) once per step for the update."""
        total = 0
        for transfer in self._program.transfers:
            source, target = self._program.values[transfer.source], self._program.values[transfer.target]
            if source.stage != self._stage:
                continue
            once = not target.per_microbatch
            if (phases is None and once) or (
                phases is not None and not once and self._phase_of.get(transfer.source) in phases
            ):
                total += source.nbytes
        return total
