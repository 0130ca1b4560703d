"""The predicted step is the one that the runtime walks: its tasks, its messages, and what a plan says of them."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import chain_loss, sgd_step
from staged_programs import chain, random_program
from test_stage_hosts import FAST, MIXED, SLOW

import bactrian
from bactrian.driver.planning.simulated_step import PlacedProgram, pipeline_of, simulated
from bactrian.driver.report.plan_diff import diff
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import CPU_CLUSTER, CPU_HOST, Cluster
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.mesh_transfers import enough_hosts, mesh_transfer, replication_seconds, stage_devices
from bactrian.passes.machine.spec import Spec
from bactrian.passes.pipelining.pipeline_events import simulate
from bactrian.passes.plan.schema import Plan, StagePlan
from bactrian.passes.plan.step_timing import StageTiming
from bactrian.runtime import unrolled_step
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instructions import Send
from bactrian.runtime.staged_program import Call, StagedProgram
from bactrian.runtime.unrolled_step import UnrolledStep


def plan_of(program: StagedProgram, timings: list[StageTiming], *, link: float | None = None) -> Plan:
    """A plan for a program; with ``link``, each transfer takes so long, on the link between its two stages."""
    transfers = PlacedProgram.of(program, CPU_CLUSTER).transfers()
    if link is not None:
        transfers = tuple(dataclasses.replace(each, link_seconds=link, latency_seconds=0.0) for each in transfers)
    stages = tuple(StagePlan(s, s, s, timing=timing) for s, timing in enumerate(timings))
    count, schedule = program.num_stages, program.schedule
    return Plan(count, program.num_microbatches, schedule, count, stages, transfers=transfers)


def random_timings(seed: int, count: int) -> list[StageTiming]:
    draw = random.Random(seed)
    return [StageTiming(*(draw.uniform(0.1, 2.0) for _ in range(4))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
def test_without_transfers_it_is_what_the_runtime_simulates(seed: int) -> None:
    program, _ = random_program(seed)
    timings = random_timings(seed, program.num_stages)
    last_round = {call.stage: call.round for call in program.calls if call.phase == "update"}

    def cost(call: Call) -> float:
        mine = timings[call.stage]
        seconds = {"forward": mine.forward_seconds, "backward": mine.backward_seconds, "prepare": mine.prepare_seconds}
        seconds["forward_backward"] = mine.forward_seconds + mine.backward_seconds
        if call.stage not in last_round:
            seconds["forward_backward"] += mine.update_seconds
        seconds["update"] = mine.update_seconds if call.round == last_round.get(call.stage) else 0.0
        return seconds.get(call.phase, 0.0)

    step = UnrolledStep(program)
    ends = unrolled_step.simulate(step, tuple(range(program.num_stages)), cost)
    pipeline = pipeline_of(plan_of(program, timings, link=0.0), program)
    assert pipeline is not None
    times = simulate(pipeline)
    assert [list(tasks) for tasks in pipeline.order] == step.stage_tasks
    for tasks, mine in zip(step.stage_tasks, times.ends, strict=True):
        assert list(mine) == pytest.approx([ends[task] for task in tasks])


@pytest.mark.parametrize("seed", range(30))
def test_messages_are_those_that_ranks_send(seed: int) -> None:
    program, _ = random_program(seed)
    streams = build_streams(program, tuple(range(program.num_stages)), broadcast_results=False)
    sent = Counter(
        (stream.rank, x.destination, x.nbytes) for stream in streams for x in stream.instructions if isinstance(x, Send)
    )
    pipeline = pipeline_of(plan_of(program, random_timings(seed, program.num_stages)), program)
    assert pipeline is not None
    times, found = simulate(pipeline), Counter[tuple[int, int, int]]()
    for each in times.messages:
        receiver = pipeline.functions[each.reader.call].mesh
        senders = {
            t.source for t in PlacedProgram.of(program, CPU_CLUSTER).transfers() if t.links == each.message.links
        }
        found[min(senders), receiver, each.message.nbytes] += 1
    assert found == sent


def test_a_plan_says_what_its_step_takes() -> None:
    """Two stages of 3 s a microbatch and messages of half a second: a round trip of 7 s for two microbatches."""
    program = chain(2, 4)
    plan, times = simulated(plan_of(program, [StageTiming(1.0, 2.0)] * 2, link=0.5), program)
    assert times is not None and plan.predicted_step_seconds == times.seconds
    first, last = (stage.timing for stage in plan.stages)
    assert first is not None and last is not None
    for timing in (first, last):
        assert timing.bubble_seconds is not None and timing.exposed_seconds is not None
        assert timing.busy_seconds(4) + timing.bubble_seconds + timing.exposed_seconds == pytest.approx(times.seconds)
    assert last.exposed_seconds and last.communication_seconds and last.communication_seconds > last.exposed_seconds
    again, _ = simulated(Plan.from_json(plan.to_json()), program)
    assert again == plan


def test_calls_take_time_beside_their_work() -> None:
    """A forward, two fused calls, a backward and the two rounds of the update follow each other."""
    program = chain(2, 2)
    cluster = Cluster("slow calls", (dataclasses.replace(CPU_HOST, call_seconds=1.0),))
    timings = PlacedProgram.of(program, cluster).with_calls([StageTiming(1.0, 2.0)] * 2)
    assert [timing.calls_seconds for timing in timings] == [7.0, 5.0]  # the first: zeros, F, F, B, B, and two rounds
    plan, times = simulated(plan_of(program, list(timings), link=0.0), program)
    assert times is not None and plan.predicted_step_seconds == (1 + 1) + 2 * (3 + 1) + (2 + 1) + 2 * 1
    first = plan.stages[0].timing
    assert first is not None and first.busy_seconds(2) == pytest.approx(times.meshes[0].busy)


def test_a_plan_of_another_program_is_refused() -> None:
    plan = plan_of(chain(2, 4), [StageTiming(1.0, 2.0)] * 2)
    with pytest.raises(ConfigError, match="do not belong together"):
        pipeline_of(plan, chain(3, 4))


def test_within_a_host_the_smaller_mesh_sends_at_once() -> None:
    cluster = Cluster("one", (dataclasses.replace(CPU_HOST, intra_host_bytes_per_second=1e9, intra_host_latency=0.25),))
    wide, narrow = stage_devices(cluster, (4, 2))
    sent = mesh_transfer(cluster, wide, narrow, 1e9)
    assert (sent.seconds, sent.latency, sent.links) == (0.5, 0.25, ("0 to 4",))
    assert mesh_transfer(cluster, narrow, wide, 1e9).links == ("4 to 0",)


def test_between_hosts_the_links_of_the_hosts_are_shared() -> None:
    host = dataclasses.replace(CPU_HOST, devices_per_host=4, inter_host_bytes_per_second=1e9, intra_host_latency=0.25)
    cluster = enough_hosts(Cluster("line", (host,)), (8, 4, 4))
    first, second, third = stage_devices(cluster, (8, 4, 4))
    assert cluster.num_devices == 16
    assert mesh_transfer(cluster, first, second, 1e9).links == ("out of host 0", "out of host 1", "into host 2")
    assert mesh_transfer(cluster, second, third, 1e9).seconds == 1.0
    both = mesh_transfer(cluster, first, range(8, 16), 1e9)
    assert both.seconds == 0.5 and both.links[2:] == ("into host 2", "into host 3")


def test_hosts_of_several_kinds_have_so_many_places() -> None:
    with pytest.raises(ConfigError, match="stage 2 of 4 devices has no place in mixed"):
        stage_devices(enough_hosts(MIXED, (4, 8, 4)), (4, 8, 4))
    assert mesh_transfer(MIXED, range(4), range(4, 12), 1e9).links == ("out of host 0", "into host 1")


def test_replicas_are_gathered_inside_the_mesh() -> None:
    mesh = Mesh((Axis("x", 2, 0.0, 4.0), Axis("y", 2, 0.0, 1.0)))
    assert replication_seconds(mesh, Spec((("x", "y"),)), 8.0) == 0.0
    assert replication_seconds(mesh, Spec((("x",),)), 8.0) == 2.0  # a half of a shard of 4 bytes, along y
    assert replication_seconds(mesh, Spec(((),)), 8.0) == 2.0 + 4.0 * 4.0  # then along x


def test_plans_of_steps_have_the_simulated_seconds(tmp_path: Path) -> None:
    state = {name: jnp.zeros((32, 32)) for name in "abcd"}
    batch = {name: np.zeros((16, 32), np.float32) for name in "xy"}
    (tmp_path / "cluster.toml").write_text(SLOW + FAST)

    def planned(mesh: str = "data=1", **options: Any) -> Any:
        step = bactrian.parallelize(sgd_step(chain_loss("abcd")), num_microbatches=4, mesh=mesh, **options)
        return step.trace(state, batch).plan(str(tmp_path / "cluster.toml"))

    one, two, wide = planned(num_stages=1), planned(num_stages=2), planned(num_stages=2, mesh="data=2")
    (stage,) = one.plan.stages
    assert one.plan.predicted_step_seconds == pytest.approx(stage.predicted_seconds)
    for each in (two, wide):
        plan, _ = simulated(each.plan, each.staged.program)
        assert plan == each.plan and len(plan.transfers) == len(each.staged.program.transfers) > 1
        assert (plan.predicted_step_seconds or 0.0) > max(stage.predicted_seconds or 0.0 for stage in plan.stages)
    # The gradient comes back over the link within the slow host.
    assert {transfer.links for transfer in two.plan.transfers} == {("0 to 1",), ("1 to 0",)}
    lines = diff(two.plan, planned(num_stages=2, schedule="gpipe").plan)
    assert any(line.startswith("stage 0: bubble_seconds") for line in lines)
