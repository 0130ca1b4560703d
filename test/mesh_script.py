"""Run by `test_mpi_mesh.py` on each rank: a model on meshes of several devices against one device."""

import sys

import models
import numerics

import bactrian

name, mesh, cluster = sys.argv[1:]
built = models.train_case(name, "adamw", microbatches=4, stages=2).make()
step = bactrian.parallelize(built.step, **built.options, mesh=mesh, cluster=cluster)
state = built.state
for batch in built.batches:
    reference = step.reference(state, *batch)
    result = step(state, *batch)
    numerics.assert_equal_step(bactrian.gather(result), reference, built.zero_gradient_leaves)
    state = built.next_state(result)
if bactrian.is_main_rank():
    print("equal", step.compiled.plan.num_devices)
