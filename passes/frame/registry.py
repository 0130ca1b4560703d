"""Which pass, pipeline or contract a name stands for. Nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.errors import ConfigError

ENTRY_POINT_GROUP = "bactrian.passes"

# flag -> "module:Class", in the order of the pipeline.
PASSES: dict[str, str] = {
    "flatten-calls": "bactrian.passes.flatten_calls:FlattenCalls",
    "adopt-shardings": "bactrian.passes.adopt_shardings:AdoptShardings",
    "verify-program": "bactrian.passes.verify_program:VerifyProgram",
    "infer-phases": "bactrian.passes.infer_phases:InferPhases",
    "group-layers": "bactrian.passes.group_layers:GroupLayers",
    "choose-pipeline": "bactrian.passes.choose_pipeline:ChoosePipeline",
    "assign-stages": "bactrian.passes.assign_stages:AssignStages",
    "clone-cheap-ops": "bactrian.passes.clone_cheap_ops:CloneCheapOps",
    "hoist-invariants": "bactrian.passes.hoist_invariants:HoistInvariants",
    "select-residuals": "bactrian.passes.select_residuals:SelectResiduals",
    "accumulate-gradients": "bactrian.passes.accumulate_gradients:AccumulateGradients",
    "fold-reversals": "bactrian.passes.fold_reversals:FoldReversals",
    "solve-shardings": "bactrian.passes.solve_shardings:SolveShardings",
    "split-stages": "bactrian.passes.split_stages:SplitStages",
    "loop-microbatches": "bactrian.passes.loop_microbatches:LoopMicrobatches",
    "partition": "bactrian.passes.partition:Partition",
    "count-collectives": "bactrian.passes.count_collectives:CountCollectives",
    "schedule-microbatches": "bactrian.passes.schedule_microbatches:ScheduleMicrobatches",
}

# flag -> "module:function" that gives the passes of a pipeline.
PIPELINES: dict[str, str] = {
    f"bactrian-{name.replace('_', '-')}": f"bactrian.passes.pipelines:{name}"
    for name in (
        "stage_step",
        "import_step",
        "form_stages",
        "localize_stages",
        "prepare_shardings",
        "shard_stages",
        "emit_stages",
        "prepare_function",
    )
}

# What holds between passes: name -> "module:function" that verifies it, in the order of the pipeline.
CONTRACTS: dict[str, str] = {
    name: f"bactrian.passes.contracts.{name}:verify"
    for name in (
        "formed",
        "typed",
        "marked",
        "called",
        "captured",
        "flat",
        "adopted",
        "verified",
        "phased",
        "layered",
        "assigned",
        "localized",
        "accumulated",
        "sharded",
        "split",
        "partitioned",
        "scheduled",
    )
} | {
    f"with-{what.replace('_', '-')}": f"bactrian.passes.contracts.placed:verify_{what}"
    for what in ("boundary", "num_microbatches", "phases", "layers", "stages", "num_stages")
}

# MLIR's pass registry can't be listed from Python; these are offered when a name is not known.
_MLIR_NAMES = (
    "canonicalize",
    "cse",
    "symbol-dce",
    "inline",
    "loop-invariant-code-motion",
    "topological-sort",
    "print-op-stats",
    "chlo-legalize-to-stablehlo",
    "stablehlo-refine-shapes",
    "sdy-import-func-calls",
    "sdy-populate-op-sharding-rules",
    "sdy-insert-explicit-reshards",
    "sdy-reshard-to-collectives",
)


@functools.cache
def _third_party() -> dict[str, str]:
    """Passes that other distributions offer as entry points; ours win."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point.value for point in sorted(found, key=lambda point: point.name)}


def names() -> list[str]:
    """Every registered name: ours in the order of the pipeline, then those of other distributions."""
    return [*PASSES, *(name for name in _third_party() if name not in PASSES)]


def is_registered(name: str) -> bool:
    """Whether ``name`` is one of our passes. Asks the entry points only when it is not built in."""
    return name in PASSES or name in _third_party()


@functools.cache
def load(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        ConfigError: if the name is not registered or its class doesn't answer to that name.
    """
    if not is_registered(name):
        raise unknown_name(name)
    target = PASSES.get(name) or _third_party()[name]
    module, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load pass {name!r} from {target}", why=str(error)) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass) and cls.name == name):
        raise ConfigError(f"{target} is not a pass named {name!r}", fix="subclass Pass and set its name")
    return cls


def load_pipeline(name: str) -> Callable[..., tuple[Any, ...]]:
    """The function that gives the passes of a pipeline, a key of `PIPELINES`; its parameters are the options."""
    return _function(PIPELINES[name])


def load_contracts(names: Iterable[str]) -> Callable[[ir.Module], None]:
    """A function that raises `PassError` where one of some contracts, keys of `CONTRACTS`, does not hold for a module."""
    verify = _function("bactrian.passes.contracts.module_view:verify_contracts")
    contracts = {name: _function(CONTRACTS[name]) for name in names}
    return lambda module: verify(module, contracts)


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def nearest(name: str) -> list[str]:
    """The three known names most like ``name``, the best first."""
    return difflib.get_close_matches(name, [*names(), *PIPELINES, *_MLIR_NAMES], n=3, cutoff=0.0)


def unknown_name(name: str) -> ConfigError:
    """The error for a name that neither Bactrian nor MLIR knows."""
    return ConfigError(f"unknown pass {name!r}", fix=f"nearest: {', '.join(nearest(name))}")
