"""The pass pipelines, by name: lists of passes that the command, the driver, the tests and the benchmarks share.

A pipeline is a function of the few options that its passes depend on; it returns passes, and as text those of MLIR.
``bactrian-opt --bactrian-form-stages='num-stages=2'`` runs one, and `registry.PIPELINES` gives each its name. Options are
numbers, texts and switches, as those of passes are. Passes are imported when their pipeline is asked for.
"""

from __future__ import annotations

from bactrian.passes.frame.pipeline import PassOrText

Passes = tuple[PassOrText, ...]


def import_step(mesh: str = "") -> Passes:
    """Flatten and verify a captured step, and find the phases of its ops."""
    from bactrian.passes.adopt_shardings import AdoptShardings
    from bactrian.passes.flatten_calls import FlattenCalls
    from bactrian.passes.infer_phases import InferPhases
    from bactrian.passes.verify_program import VerifyProgram

    return (
        # Calls first: every later pass reads one straight-line function.
        FlattenCalls(),
        # The user's shardings before the program is verified, so that errors about them name the user's own ops.
        AdoptShardings(mesh=mesh),
        # Before anything is simplified: what is refused has the user's line, and stands as the user wrote it.
        VerifyProgram(),
        # What tracing wrote twice must not be given two phases, layers or stages.
        "canonicalize",
        "cse",
        InferPhases(),
    )


def form_stages(
    num_stages: int = 0,
    num_layers: int = 0,
    boundaries: str = "",
    mesh: str = "",
    cluster: str = "",
    remat: str = "",
    most_layers: int = 0,
    first_devices: str = "",
) -> Passes:
    """Group ops into layers, and layers into pipeline stages, each with a mesh."""
    from bactrian.passes.assign_stages import AssignStages
    from bactrian.passes.group_layers import GroupLayers

    return (
        GroupLayers(num_layers=num_layers, num_stages=num_stages, most_layers=most_layers, cluster=cluster),
        AssignStages(
            num_stages=num_stages,
            boundaries=boundaries,
            mesh=mesh,
            remat=remat,
            first_devices=first_devices,
            cluster=cluster,
        ),
    )


def find_stages(
    num_stages: int = 0,
    num_microbatches: int = 0,
    boundaries: str = "",
    mesh: str = "",
    schedule: str = "",
    remat: str = "",
    cluster: str = "",
    measured: str = "",
    num_workers: int = 1,
    memory_share: str = "",
) -> Passes:
    """Find the pipeline of grouped layers that takes a step the least time."""
    from bactrian.passes.choose_pipeline import ChoosePipeline

    return (
        ChoosePipeline(
            num_stages=num_stages,
            boundaries=boundaries,
            mesh=mesh,
            schedule=schedule,
            remat=remat,
            cluster=cluster,
            num_microbatches=num_microbatches,
            measured=measured,
            num_workers=num_workers,
            memory_share=memory_share,
        ),
    )


def group_blocks(most_layers: int, num_stages: int = 0, cluster: str = "") -> Passes:
    """Import a step, and group it into a layer for each block that repeats."""
    from bactrian.passes.group_layers import GroupLayers

    return (*import_step(), GroupLayers(most_layers=most_layers, num_stages=num_stages, cluster=cluster))


def localize_stages(cluster: str = "", unhoisted: str = "") -> Passes:
    """Clone or recompute what each stage needs, and make accumulators explicit."""
    from bactrian.passes.accumulate_gradients import AccumulateGradients
    from bactrian.passes.clone_cheap_ops import CloneCheapOps
    from bactrian.passes.hoist_invariants import HoistInvariants
    from bactrian.passes.select_residuals import SelectResiduals

    return (
        # Constants, masks and random bits are computed where they are read: they would be sent otherwise.
        CloneCheapOps(),
        # Before residuals: what is there all step long need not be kept for a microbatch.
        HoistInvariants(cluster=cluster, skip=unhoisted),
        # Then, within a stage: what the backward phase is given, and what it computes again.
        SelectResiduals(),
        # Last, because accumulators and combined partial results belong to one stage each.
        AccumulateGradients(),
    )


def prepare_shardings() -> Passes:
    """Annotate every op with its sharding rule."""
    from bactrian.passes.fold_reversals import FoldReversals

    return (FoldReversals(), "func.func(sdy-populate-op-sharding-rules)")


def shard_stages(
    cluster: str = "",
    memory_bytes: str = "",
    time_limit: float = 60.0,
    strategy: str = "auto",
    compare: bool = False,
    tolerance: float = 0.0,
    num_workers: int = 1,
) -> Passes:
    """Choose a sharding for every value on the mesh of its stage."""
    from bactrian.passes.solve_shardings import SolveShardings

    return (
        SolveShardings(
            cluster=cluster,
            memory_bytes=memory_bytes,
            time_limit=time_limit,
            strategy=strategy,
            tolerance=tolerance,
            compare=compare,
            num_workers=num_workers,
        ),
    )


def emit_stages(donate: bool = True) -> Passes:
    """Make one device's function per stage and phase, and schedule the microbatches."""
    from bactrian.passes.loop_microbatches import LoopMicrobatches
    from bactrian.passes.partition import Partition
    from bactrian.passes.schedule_microbatches import ScheduleMicrobatches
    from bactrian.passes.split_stages import SplitStages

    return (
        SplitStages(donate=donate),
        # A single stage whose forward and backward are one function needs no schedule: it loops by itself.
        LoopMicrobatches(),
        # What is computed twice in a function would be sent twice.
        "func.func(cse)",
        Partition(),
        ScheduleMicrobatches(),
    )


def up_to_stages(
    num_stages: int,
    num_layers: int,
    boundaries: str,
    mesh: str,
    cluster: str,
    remat: str = "",
    most_layers: int = 0,
    first_devices: str = "",
) -> Passes:
    """The part of `stage_step` after which the planner measures ops and names layers, while ops still have layers."""
    formed = form_stages(num_stages, num_layers, boundaries, mesh, cluster, remat, most_layers, first_devices)
    return (*import_step(mesh), *formed)


def up_to_shardings(mesh: str, cluster: str = "", unhoisted: str = "") -> Passes:
    """The part after `up_to_stages`: the planner keeps what it leaves, to solve again and to explain the choice."""
    # Stages of one device have nothing to shard.
    return (*localize_stages(cluster, unhoisted), *(prepare_shardings() if mesh else ()))


def up_to_schedule(
    mesh: str,
    cluster: str,
    strategy: str,
    donate: bool,
    memory_bytes: str = "",
    time_limit: float = 60.0,
    compare: bool = False,
    tolerance: float = 0.0,
    num_workers: int = 1,
) -> Passes:
    """The part after `up_to_shardings`."""
    sharded = shard_stages(cluster, memory_bytes, time_limit, strategy, compare, tolerance, num_workers) if mesh else ()
    return (*sharded, *emit_stages(donate))


def stage_step(
    num_stages: int = 1,
    num_layers: int = 0,
    boundaries: str = "",
    mesh: str = "",
    cluster: str = "",
    strategy: str = "auto",
    donate: bool = True,
    remat: str = "",
) -> Passes:
    """Turn a captured step into scheduled stages: everything here, in order."""
    return (
        *up_to_stages(num_stages, num_layers or num_stages, boundaries, mesh, cluster, remat),
        *up_to_shardings(mesh, cluster),
        *up_to_schedule(mesh, cluster, strategy, donate),
    )


def prepare_function() -> Passes:
    """Flatten a function that is no train step, and annotate it with sharding rules."""
    from bactrian.passes.flatten_calls import FlattenCalls

    return (FlattenCalls(), "canonicalize", "cse", *prepare_shardings())
