"""Predicted bytes equal the bytes counted from Shardy's explicit collectives; known plans are found."""

from __future__ import annotations

import pytest
import sharded
from jaxlib.mlir import ir
from test_sharding_numerics import MESHES, program

from bactrian.passes.ir.regions import main_function
from bactrian.passes.network.solver import solve
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages


def check_bytes(seed: int) -> None:
    """The best shardings of a random program: what the writer has added up, and what Shardy sends."""
    function, arguments = program(seed)
    axes = MESHES[seed % len(MESHES)]
    module = sharded.lowered(function, arguments, axes)
    reading, model = sharded.read(module, axes)
    choice = solve(model.network, 30.0).choice
    with module.context, ir.Location.unknown():
        writer = Writer(main_function(module), reading, model, model.shardings(choice), "stage0")
        write_stages([writer])
    assert sharded.counted_bytes(module, axes) == pytest.approx(writer.sent)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_those_of_shardy(seed: int) -> None:
    check_bytes(seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_bytes_of_many_programs_are_those_of_shardy(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        check_bytes(seed)
