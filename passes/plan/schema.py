"""The plan: every decision about a program, and what was predicted of it, as plain data. No MLIR, no jax."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.frame.fields import MAX_COUNT
from bactrian.passes.frame.files import write_whole
from bactrian.passes.frame.views import Viewable, view
from bactrian.passes.frame.visible import visible
from bactrian.passes.machine.spec import axes_text
from bactrian.passes.plan.json_fields import Option, add_record, as_mapping, check_types, decode, encode
from bactrian.passes.plan.pipeline_record import PipelineRecord
from bactrian.passes.plan.remat_words import check_words
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.passes.plan.step_timing import StageMeasurement, StageTiming, TransferTiming

VERSION = 2
PLAN_FILE = "plan.json"
STAGED_FILE = "staged.mlir"
UNSOLVED_FILE = "solve.mlir"


@dataclass(frozen=True)
class LayerPlan:
    """One layer of the program, named so that a reader finds it in the user's source."""

    layer: int
    first_op: str = ""  # "stablehlo.dot_general at train.py:12"
    modules: tuple[str, ...] = ()  # the user's module names, in order of appearance
    seconds: float | None = None  # predicted, of a microbatch on one device, forward and backward


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: its layers and its mesh, and what was predicted of it.

    Flops, activations and bytes sent are of one microbatch and of the whole stage, over all devices of its mesh;
    ``update_sent_bytes`` is once per step. ``predicted_seconds`` is the stage's busy time in one step.
    What is ``None`` was not predicted.
    """

    stage: int
    first_layer: int
    last_layer: int  # inclusive
    mesh: tuple[tuple[str, int], ...] = (("data", 1),)
    first_device: int | None = None  # on the cluster's line of hosts; where it is not given, stages lie along it
    forward_flops: int | None = None
    backward_flops: int | None = None
    num_parameters: int | None = None
    parameter_bytes: int | None = None
    state_bytes: int | None = None  # parameters included
    prepared_bytes: int | None = None  # made once per step for all microbatches, such as casts of parameters
    activation_bytes: int | None = None  # kept from forward to backward
    microbatches_in_flight: int | None = None
    sent_bytes_forward: int | None = None
    sent_bytes_backward: int | None = None
    update_sent_bytes: int | None = None
    predicted_seconds: float | None = None
    sharding: ShardingPlan | None = None
    timing: StageTiming | None = None
    measured: StageMeasurement | None = None  # then the timing is measured too

    @property
    def num_layers(self) -> int:
        """Number of layers of this stage."""
        return self.last_layer - self.first_layer + 1

    @property
    def num_devices(self) -> int:
        """Number of devices of this stage's mesh."""
        return math.prod(size for _, size in self.mesh)

    @property
    def flops(self) -> int | None:
        """Flops of one microbatch, forward and backward."""
        return add_known(self.forward_flops, self.backward_flops)

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of state and of what is prepared, plus the activations of all microbatches in flight."""
        if self.state_bytes is None or self.activation_bytes is None or self.microbatches_in_flight is None:
            return None
        held = self.state_bytes + (self.prepared_bytes or 0)
        return held + self.activation_bytes * self.microbatches_in_flight

    @property
    def device_memory_bytes(self) -> int | None:
        """Bytes of each device: what was measured, or else what its shardings leave there, on a mesh of several."""
        if self.measured is not None:
            return self.measured.peak_bytes
        if self.sharding is None:
            return self.memory_bytes
        if self.sharding.peak_bytes is not None:
            return self.sharding.peak_bytes
        return sum(nbytes for _, nbytes in self.sharding.memory_bytes)


@dataclass(frozen=True)
class Remark:
    """Something that the passes tell of the program or of the plan: a remark, or a warning of something doubtful."""

    severity: str  # "remark" or "warning"
    message: str
    where: str = ""  # "train.py:12 (jit(step)/while)", several places separated by commas
    why: str = ""
    fix: str = ""

    def text(self) -> str:
        """The message with its where, why and fix, one per line; without control characters."""
        parts = (("where", self.where), ("why", self.why), ("fix", self.fix))
        return visible("\n".join([self.message, *(f"  {name}: {part}" for name, part in parts if part)]))


add_record(LayerPlan, "a list of layers")
add_record(Remark, "a list of remarks")
add_record(StagePlan, "a list of stages")


@dataclass(frozen=True, eq=False)
class Plan(Viewable):
    """The decisions about one program plus predictions. Equal plans have byte-identical JSON, and only they.

    A plan can be written by hand: predictions, layer names and the fingerprint may be left out.

    Raises:
        ConfigError: the decisions contradict each other.
    """

    num_stages: int
    num_microbatches: int
    schedule: str
    num_layers: int
    stages: tuple[StagePlan, ...]
    layers: tuple[LayerPlan, ...] = ()
    remat: tuple[str, ...] = ()  # a word for each layer; none where nothing is computed again
    fingerprint: str = ""  # of the program; "" fits every program
    platform: str = "cpu"
    predicted_step_seconds: float | None = None
    peak_memory_bytes: int | None = None  # of the device that needs most
    options: tuple[tuple[str, Option], ...] = ()
    remarks: tuple[Remark, ...] = ()  # each once
    pipeline: PipelineRecord | None = None  # where the stages were found
    transfers: tuple[TransferTiming, ...] = ()  # as many as the program in stages has, in its order
    version: int = field(default=VERSION, kw_only=True)

    def __post_init__(self) -> None:
        check_types(self, "plan")
        object.__setattr__(self, "options", tuple(sorted(self.options, key=lambda option: option[0])))
        _check_decisions(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __str__(self) -> str:
        return view(self).text()

    @property
    def num_devices(self) -> int:
        """Number of devices of all stages."""
        return sum(stage.num_devices for stage in self.stages)

    @property
    def forward_only(self) -> bool:
        """Whether the program is known to have no backward phase, so that its schedule makes no difference."""
        return bool(self.stages) and all(
            stage.forward_flops is not None and stage.backward_flops == 0 and stage.activation_bytes == 0
            for stage in self.stages
        )

    def time_shares(self) -> tuple[float | None, ...]:
        """Each stage's share of the work: of the predicted seconds, or of the flops where no time was predicted."""
        for weights in ([s.predicted_seconds for s in self.stages], [s.flops for s in self.stages]):
            known = [weight for weight in weights if weight is not None]
            if len(known) == len(weights) and sum(known) > 0:
                return tuple(weight / sum(known) for weight in known)
        return (None,) * len(self.stages)

    def check_program(self, fingerprint: str) -> None:
        """Refuse a program other than the one that this plan was made for.

        Raises:
            ProgramError: the fingerprints differ.
        """
        if self.fingerprint and self.fingerprint != fingerprint:
            raise ProgramError(
                f"this plan was made for program {self.fingerprint[:12]}, but this program is {fingerprint[:12]}",
                why="the traced step differs: its source, shapes, dtypes, static arguments or jax version changed",
                fix="make the plan again with `bactrian plan --save`, or run the program that it was made for",
            )

    def to_json(self) -> str:
        """Canonical JSON: fields in declaration order, options sorted, a newline at the end."""
        return json.dumps({"version": self.version} | encode(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = PLAN_FILE) -> Plan:
        """Read a plan from its JSON form.

        Raises:
            ConfigError: not JSON, an unknown version or key, a missing key or a value of the wrong type.
        """
        try:
            data: Any = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
        except RecursionError:
            raise ConfigError(f"cannot read plan {source}: nested too deeply") from None
        except ValueError as error:
            raise ConfigError(
                f"cannot read plan {source}: not JSON: {error}", fix="restore or remake the plan"
            ) from None
        data = as_mapping(data, "plan", source)
        version = data.get("version")
        if version == 1 and type(version) is int:
            data, version = _from_version_1(data), VERSION
        if type(version) is not int or version != VERSION:
            shown = "no version" if version is None else f"version {json.dumps(version)}"
            raise ConfigError(
                f"cannot read plan {source}: it has {shown}, this Bactrian reads version {VERSION}",
                fix="make the plan again with `bactrian plan --save`",
            )
        return decode(cls, data, "plan", source)

    def save(self, directory: str | Path, staged_text: str | None = None, unsolved_text: str | None = None) -> None:
        """Write ``plan.json`` into a folder, and, if they are given, the staged module as ``staged.mlir`` and the
        module before shardings were chosen as ``solve.mlir``."""
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in ((STAGED_FILE, staged_text), (UNSOLVED_FILE, unsolved_text)):
                if text is None:
                    (folder / name).unlink(missing_ok=True)  # it would belong to another plan
                else:
                    write_whole(folder / name, text)
            write_whole(folder / PLAN_FILE, self.to_json())
        except OSError as error:
            raise ConfigError(
                f"cannot save the plan in {folder}: {error.strerror}", fix="name a folder that can be written"
            ) from error

    @classmethod
    def load(cls, directory: str | Path) -> Plan:
        """Read the plan in a folder, or a plan file itself."""
        path = Path(directory)
        path = path / PLAN_FILE if path.is_dir() else path
        return cls.from_json(_read(path), source=str(path))


def fingerprint_text(text: str) -> str:
    """The fingerprint of a program's text: SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def add_known(*values: int | None) -> int | None:
    """The sum, or ``None`` if any of the values is unknown."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _check_decisions(plan: Plan) -> None:
    problems: list[str] = []
    for name in ("num_stages", "num_microbatches", "num_layers"):
        if not 1 <= getattr(plan, name) <= MAX_COUNT:
            problems.append(f"{name} is {getattr(plan, name)}, should be from 1 to {MAX_COUNT}")
    if plan.version != VERSION:
        problems.append(f"version is {plan.version}, should be {VERSION}")
    if len(plan.stages) != plan.num_stages:
        problems.append(f"num_stages is {plan.num_stages}, but {len(plan.stages)} stages are listed")
    numbers = [layer.layer for layer in plan.layers]
    if numbers and (len(numbers) != plan.num_layers or numbers != list(range(len(numbers)))):
        problems.append(f"layers should be numbered 0 to {plan.num_layers - 1} in order, or be left out")
    if plan.remat and len(plan.remat) != plan.num_layers:
        problems.append(f"remat has {len(plan.remat)} words, should have one for each of the {plan.num_layers} layers")
    check_words(plan.remat)
    following = 0
    for position, stage in enumerate(plan.stages):
        if stage.stage != position:
            problems.append(f"stages[{position}] is called stage {stage.stage}")
        if stage.first_layer != following or stage.last_layer < stage.first_layer:
            layers = f"{stage.first_layer} to {stage.last_layer}"
            problems.append(
                f"stage {position} has layers {layers}, should begin at layer {following} and have at least one"
            )
        if not stage.mesh or any(size < 1 for _, size in stage.mesh):
            problems.append(f"stage {position} has a mesh without devices: {axes_text(stage.mesh) or 'no axes'}")
        following = stage.last_layer + 1
    if plan.stages and following != plan.num_layers:
        problems.append(f"the stages end at layer {following - 1}, should end at layer {plan.num_layers - 1}")
    if problems:
        raise ConfigError("bad plan: " + "; ".join(problems[:5]))


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of version 1 in the words of version 2: the ``layouts`` of a stage's sharding are its ``shardings``."""
    stages = data.get("stages")
    for stage in cast(list[Any], stages) if isinstance(stages, list) else ():
        sharding = cast(dict[str, Any], stage).get("sharding") if isinstance(stage, dict) else None
        if isinstance(sharding, dict) and "layouts" in sharding:
            sharding["shardings"] = sharding.pop("layouts")
    return data | {"version": VERSION}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"cannot read plan {path}: {reason}", fix="name a folder that `bactrian plan --save` wrote"
        ) from error
