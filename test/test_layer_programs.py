"""The layers of a step as programs: kinds, borders, what is kept."""

from __future__ import annotations

import layered_steps
import pytest
from jaxlib.mlir import ir

from bactrian.passes import pipelines
from bactrian.passes.assign_stages import AssignStages
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.group_layers import GroupLayers
from bactrian.passes.ir.attributes import ACCUMULATE, layer_of, phase_of, stage_of
from bactrian.passes.ir.meshes import make_user_mesh
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.pipelining.layer_programs import read_layers
from bactrian.passes.pipelining.layers import BACKWARD, FORWARD, ONCE, LayerProgram, ProgramLayers

ACTIVATIONS = 4 * layered_steps.ROWS * layered_steps.LENGTH * layered_steps.WIDTH
"""Bytes of the activations of one microbatch between two blocks."""


def read(blocks: int, num_layers: int, epsilon: float = 0.1) -> ProgramLayers:
    module = layered_steps.grouped(blocks, num_layers, epsilon)
    with module.context, ir.Location.unknown():
        return read_layers(module, layered_steps.HOSTS)


def borders(program: LayerProgram) -> list[tuple[bool, bool]]:
    """(goes up, comes in) of each border value."""
    return [(border.is_up, border.is_input) for border in program.borders]


def test_equal_blocks_are_equal_layers() -> None:
    layers = read(4, 5)
    assert layers.kind_of == (0, 1, 1, 1, 2)
    assert layers.rows == layered_steps.ROWS
    assert layers.border_bytes == (0, *[2 * ACTIVATIONS] * 4)  # up and back
    first, block, last = layers.kinds
    assert borders(first) == [(False, True), (True, False)]
    assert sorted(borders(block)) == [(False, False), (False, True), (True, False), (True, True)]
    assert borders(last) == [(True, True), (False, False)]


def test_a_layer_does_not_depend_on_how_many_there_are() -> None:
    assert read(3, 4).kinds == read(5, 6).kinds


def test_layers_that_are_cut_elsewhere_are_of_other_kinds() -> None:
    layers = read(4, 6)
    assert len(layers.kinds) > 3
    assert layers.border_bytes[1] > 2 * ACTIVATIONS  # in the middle of a block


def test_what_a_layer_keeps_is_what_its_backward_phase_reads() -> None:
    _, block, _ = read(4, 5).kinds
    problem = block.problem
    made = {
        value for op, phase in zip(problem.ops, block.phases, strict=True) if phase == FORWARD for value in op.results
    }
    incoming = {border.value for border in block.borders if border.is_up and border.is_input}
    shapes = sorted(problem.values[value].shape for value in block.kept)
    rows = layered_steps.ROWS, layered_steps.LENGTH
    # The operands of the two products, and where relu's is positive.
    assert shapes == [(*rows, layered_steps.WIDTH), (*rows, 4 * layered_steps.WIDTH), (*rows, 4 * layered_steps.WIDTH)]
    assert block.kept <= made | incoming


def test_layers_have_their_update_and_the_gradients_that_wait_for_it() -> None:
    _, block, _ = read(4, 5).kinds
    problem = block.problem
    assert set(block.phases) == {FORWARD, BACKWARD, ONCE}
    assert block.roles.count("state") == len(problem.updates) == 2
    assert sum(op.live_whole_step for op in problem.ops) == 2
    assert {op.runs_per_step for op in problem.ops} == {1.0}


def test_the_module_is_left_as_it_is() -> None:
    module = layered_steps.grouped(2, 3)
    before = str(module)
    with module.context, ir.Location.unknown():
        read_layers(module, layered_steps.HOSTS)
    assert str(module) == before


def test_stages_that_are_there_already_do_not_matter() -> None:
    module = layered_steps.grouped(3, 4)
    with module.context, ir.Location.unknown():
        alone = read_layers(module, layered_steps.HOSTS)
        run_pipeline(module, [AssignStages(num_stages=2)])
        assert read_layers(module, layered_steps.HOSTS) == alone


def test_shardings_of_the_user_are_refused() -> None:
    module = layered_steps.grouped(2, 3)
    with module.context, ir.Location.unknown():
        make_user_mesh(module, [(("data", 2),)])
        with pytest.raises(ConfigError, match="cannot choose meshes for a program with shardings of its own"):
            read_layers(module, layered_steps.HOSTS)


def test_clones_accumulators_and_parts_of_sums_have_a_layer() -> None:
    module = layered_steps.blocks_step(3, tied=True)
    run_pipeline(module, [GroupLayers(num_layers=4), AssignStages(num_stages=2), *pipelines.localize_stages()])
    ops = [view.operation for view in body(main_function(module)).operations]
    placed = [op for op in ops if stage_of(op) is not None]
    layers = {stage: {layer_of(op) for op in placed if stage_of(op) == stage} for stage in (0, 1)}
    assert layers[0] | layers[1] == {0, 1, 2, 3} and not layers[0] & layers[1]
    assert {phase_of(op) for op in placed} >= {"initialize", "backward", "update"}
    accumulators = [layer_of(op) for op in placed if ACCUMULATE in op.attributes]
    assert len(accumulators) == 9  # two weights of three blocks, the embedding in two parts, the loss
    assert set(accumulators) == {0, 1, 2, 3}
