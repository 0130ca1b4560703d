"""One plan for all ranks: rank 0 makes it, the others take it over.

A choice of shardings that ends by the clock is not the same twice, and ranks of one host would solve against each
other.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.driver.planning.options import Options
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.ranks import World
from bactrian.passes.frame.context import make_context
from bactrian.passes.machine.cluster_file import file_text, split_table
from bactrian.passes.machine.spec import MeshAxes, meshes_text, num_devices
from bactrian.passes.plan.schema import Plan, fingerprint_text
from bactrian.passes.plan.stage_sharding import ShardingPlan


def staged_together(
    make: Callable[[], StagedPlan], fingerprint: str, options: Options, meshes: Sequence[MeshAxes], world: World
) -> StagedPlan:
    """What ``make`` gives on rank 0, on every rank (collective).

    Args:
        make: plans the program; called on rank 0 alone.
        fingerprint: of the program, which every rank has captured.
        options: what every rank was told.
        meshes: of the stages, or one for all of them.
        world: the ranks.

    Raises:
        ConfigError: ranks have other programs or options.
        BactrianError: what ``make`` raised on rank 0.
    """
    world.check_equal(
        {
            "the program": fingerprint,
            "num_stages": str(options.num_stages),
            "boundaries": ", ".join(map(str, options.boundaries)) or "none",
            "the mesh": meshes_text(meshes),
            "the strategy": options.strategy,
            "remat": ", ".join(options.remat) or "none",
            "donate": str(options.donate),
            "the cluster file": _cluster_words(options.cluster),
            "the plan that is applied": "none" if options.plan is None else options.plan.to_json(),
        }
    )
    made = list[StagedPlan]()

    def packed() -> _Packed:
        made.append(make())
        return _pack(made[0])

    received = world.from_rank_0(packed)
    return made[0] if made else _unpack(received)


def _cluster_words(cluster: str) -> str:
    """What has to be equal of a cluster on all ranks, wherever its file is."""
    return f"{fingerprint_text(file_text(cluster))} {split_table(cluster)[1]}".strip() if cluster else "none"


def with_shardings_of_rank_0(staged: StagedPlan, world: World) -> StagedPlan:
    """The staged program of rank 0, where ranks that decided the same found other shardings (collective)."""
    if world.num_ranks == 1 or all(num_devices(stage.mesh) == 1 for stage in staged.plan.stages):
        return staged
    digests: list[str] = world.control.allgather(fingerprint_text(f"{staged.plan.to_json()}\n{staged.text}"))
    if len(set(digests)) == 1:
        return staged
    received = world.from_rank_0(lambda: _pack(staged))
    return staged if world.rank == 0 else _unpack(received)


def outline(plan: Plan) -> Plan:
    """A plan without what a search that ends by the clock may find otherwise: shardings, and what follows of them and is
    said of them."""
    if all(num_devices(stage.mesh) == 1 for stage in plan.stages):
        return plan
    stages = tuple(
        replace(
            stage,
            sharding=_asked(stage.sharding),
            predicted_seconds=None,
            timing=None,
            measured=None,
        )
        for stage in plan.stages
    )
    return replace(plan, stages=stages, predicted_step_seconds=None, peak_memory_bytes=None, remarks=(), transfers=())


def _asked(sharding: ShardingPlan | None) -> ShardingPlan | None:
    return None if sharding is None else ShardingPlan(sharding.strategy, given=sharding.given)


@dataclass(frozen=True)
class _Packed:
    """A staged program as it is sent."""

    plan: str
    module: bytes
    unsolved: bytes | None
    donate: bool


def _pack(staged: StagedPlan) -> _Packed:
    unsolved = None if staged.unsolved is None else _bytecode(staged.unsolved)
    return _Packed(staged.plan.to_json(), _bytecode(staged.module.operation), unsolved, staged.donate)


def _unpack(packed: _Packed) -> StagedPlan:
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse(packed.module)
        unsolved = None if packed.unsolved is None else ir.Module.parse(packed.unsolved).operation
    plan = Plan.from_json(packed.plan, source="the plan of rank 0")
    return StagedPlan(plan, module, packed.donate, unsolved)


def _bytecode(op: ir.Operation) -> bytes:
    with op.context:
        written = io.BytesIO()
        op.write_bytecode(written)
    return written.getvalue()
