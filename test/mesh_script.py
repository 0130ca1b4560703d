"""Run by `test_mpi_mesh.py` on each rank: a model on meshes of several devices against one device."""

import sys

import models
from meshes import check

import bactrian
from bactrian.driver.run.session import groups_of_stages
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instructions import Send
from bactrian.runtime.shard_packing import packed
from bactrian.runtime.stage_groups import StageGroups
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.transports.mpi import MpiTransport

sent = [0]
send_boxes = MpiTransport.send_boxes


def counting(self, array, boxes, destination, tag):
    sent[0] += packed(array, boxes).nbytes
    return send_boxes(self, array, boxes, destination, tag)


def counting_whole(self, array, destination, tag, *, move=False):
    sent[0] += array.nbytes
    return send(self, array, destination, tag, move=move)


def value_bytes(program: StagedProgram, groups: StageGroups) -> int:
    """Bytes of the values that one step sends between groups of ranks."""
    lists = build_streams(program, groups.of_stage)
    return sum(x.nbytes for one in lists for x in one.instructions if isinstance(x, Send))


send = MpiTransport.send
MpiTransport.send, MpiTransport.send_boxes = counting_whole, counting
name, mesh, cluster, stages = sys.argv[1:]
built = models.train_case(name, "adamw", microbatches=4, stages=int(stages)).make()
compiled = check(built, mesh=mesh, cluster=cluster, num_stages=int(stages))
session = compiled.session
program = session.staged.program
groups = groups_of_stages([program.mesh(stage) for stage in range(program.num_stages)], session.world)
expected = value_bytes(program, groups) * len(built.batches)
assert sum(session.world.control.allgather(sent[0])) == expected, (sent[0], expected)
num_groups = len(groups.sizes)
assert expected > 0 or num_groups == 1
specs = [(program.values[t.source].spec, program.values[t.target].spec) for t in program.transfers]
assert num_groups == 1 or any(source != target for source, target in specs)
if bactrian.is_main_rank():
    print("equal", compiled.plan.num_devices)
