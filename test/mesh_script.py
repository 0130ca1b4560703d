"""Run by `test_mpi_mesh.py` on each rank: a model on meshes of several devices against one device."""

import sys

import models
from meshes import check

import bactrian
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instructions import Send
from bactrian.runtime.shard_packing import packed
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.transports.mpi import MpiTransport

sent = [0]
send_boxes = MpiTransport.send_boxes


def counting(self, array, boxes, destination, tag):
    sent[0] += packed(array, boxes).nbytes
    return send_boxes(self, array, boxes, destination, tag)


def value_bytes(program: StagedProgram, num_groups: int) -> int:
    """Bytes of the values that one step sends between groups of ranks."""
    lists = build_streams(program, tuple(stage % num_groups for stage in range(program.num_stages)))
    return sum(x.nbytes for one in lists for x in one.instructions if isinstance(x, Send))


MpiTransport.send_boxes = counting
name, mesh, cluster, stages = sys.argv[1:]
built = models.train_case(name, "adamw", microbatches=4, stages=int(stages)).make()
compiled = check(built, mesh=mesh, cluster=cluster, num_stages=int(stages))
session = compiled.session
if session.mesh_control is not None:
    program = session.staged.program
    num_groups = session.world.num_ranks // session.mesh_control.size
    expected = value_bytes(program, num_groups) * len(built.batches)
    assert sum(session.world.control.allgather(sent[0])) == expected, (sent[0], expected)
    assert expected > 0 or num_groups == 1
    specs = [(program.values[t.source].spec, program.values[t.target].spec) for t in program.transfers]
    assert num_groups == 1 or any(source != target for source, target in specs)
if bactrian.is_main_rank():
    print("equal", compiled.plan.num_devices)
