"""Predicted bytes equal the bytes counted from Shardy's explicit collectives; known plans are found."""

from __future__ import annotations

import pytest
import sharded
from jaxlib.mlir import ir
from test_sharding_numerics import MESHES, program

from bactrian.passes.cluster import CPU_HOST, Cluster, cluster_of
from bactrian.passes.network.solve import solve
from bactrian.passes.program import main_function
from bactrian.passes.sharding.counting import count_collectives
from bactrian.passes.sharding.scattering import scattered
from bactrian.passes.sharding.writing import Writer

# An all-reduce is measured to take less than a reduce-scatter, as it may on CPUs: slices of all-reduces cost nothing.
SIZES = [1 << 10, 1 << 20]
ALIKE = cluster_of(
    {
        "hosts": 1, "devices_per_host": 8, "memory_gib": 1, "memory_gb_per_s": 0.001, "intra_host_gb_per_s": 1.0,
        "intra_host_latency_us": 0.01, "peak_tflops": {"default": 1e-5},
        "measured": {
            kind: {str(group): {"bytes": SIZES, "seconds": [factor * 1e-6, factor * 1e-4]} for group in (2, 3, 4)}
            for kind, factor in (("all_reduce", 1.0), ("reduce_scatter", 1.1))
        },
    },
    name="alike",
)  # fmt: skip


def check_bytes(seed: int, cluster: Cluster = CPU_HOST) -> None:
    """The best layouts of a random program: what the writer has added up, and what Shardy sends."""
    function, arguments = program(seed)
    axes = MESHES[seed % len(MESHES)]
    module = sharded.lowered(function, arguments, axes)
    reading, model = sharded.read(module, axes, cluster)
    choice = scattered(model, solve(model.network, 30.0)).choice
    with module.context, ir.Location.unknown():
        writer = Writer(main_function(module), reading, model, model.shardings(choice), "stage0")
        writer.write()
    counted = dict[str, float]()
    for collective in count_collectives(module):
        if collective.nbytes:
            counted[collective.kind] = counted.get(collective.kind, 0.0) + collective.nbytes
    assert counted == pytest.approx(writer.sent)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_those_of_shardy(seed: int) -> None:
    check_bytes(seed)


@pytest.mark.parametrize("seed", range(40, 60))
def test_bytes_where_an_all_reduce_takes_less_than_a_reduce_scatter(seed: int) -> None:
    check_bytes(seed, ALIKE)


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_bytes_of_many_programs_are_those_of_shardy(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        check_bytes(seed)
