"""Options of layers on meshes: what they add up to, and how near it comes to the full solver."""

from __future__ import annotations

import layered_steps
import pytest
from jaxlib.mlir import ir

from bactrian.passes import pipelines
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.machine.spec import MeshAxes, num_devices
from bactrian.passes.network.solver import solve
from bactrian.passes.pipelining.layer_menus import SizedLayers, menus, mesh_shapes
from bactrian.passes.pipelining.layer_networks import LayerNetwork
from bactrian.passes.pipelining.layer_options import LayerOption
from bactrian.passes.pipelining.layer_programs import read_layers
from bactrian.passes.pipelining.layers import ProgramLayers
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.stage_programs import read_stage

HOSTS, MICROBATCHES = layered_steps.HOSTS, 4
SQUARE: MeshAxes = (("data", 2), ("model", 2))


def read(blocks: int) -> ProgramLayers:
    module = layered_steps.grouped(blocks, blocks + 1)
    with module.context, ir.Location.unknown():
        return read_layers(module, HOSTS)


def step_seconds(option: LayerOption) -> float:
    return MICROBATCHES * (option.forward_seconds + option.backward_seconds) + option.update_seconds


def full_solution(blocks: int, axes: MeshAxes) -> float:
    """Seconds of a step as the solver has them that sees all layers at once, as one stage."""
    module = layered_steps.grouped(blocks, blocks + 1)
    with module.context, ir.Location.unknown():
        run_pipeline(module, "builtin.module(assign-stages{num-stages=1})")
        del module.operation.attributes["bactrian.schedule"]
        run_pipeline(module, [*pipelines.localize_stages(), *pipelines.prepare_shardings()])
        program = read_stage(module, 0, HOSTS.mesh(axes), HOSTS, lambda op, text: None)
    solution = solve(ShardingModel(program.reading.problem, program.mesh).network)
    assert solution.optimal
    return float(solution.cost)


@pytest.mark.parametrize("axes", [(("data", 1), ("model", 4)), SQUARE, (("data", 4), ("model", 2))])
def test_layers_add_up_to_what_the_full_solver_finds(axes: MeshAxes) -> None:
    layers = read(3)
    ((menu,),) = menus([SizedLayers(layers, MICROBATCHES)], HOSTS, [axes])
    fastest = [min(map(step_seconds, options)) for options in menu.options]
    composed = sum(fastest[kind] for kind in layers.kind_of)
    assert composed == pytest.approx(full_solution(3, axes), rel=0.02)


def test_the_seconds_of_a_choice_are_its_cost_without_a_price() -> None:
    for kind in read(3).kinds:
        network = LayerNetwork(kind, HOSTS.mesh(SQUARE), MICROBATCHES)
        problem = network.priced(0.0, 1.0, {})
        choice = solve(problem).choice
        usage = network.usage(choice)
        loads = sum(
            MICROBATCHES
            * seconds
            / network.model.shardings(choice[: len(network.held)]).arguments[value].num_shards({"data": 2, "model": 2})
            for value, seconds in kind.problem.loads
        )
        total = MICROBATCHES * (usage.forward + usage.backward) + usage.once
        assert total + loads == pytest.approx(float(problem.cost(choice)))


def test_layers_fit_behind_each_other() -> None:
    """What one gives is sharded as the next one gets it, whatever kinds they are."""
    layers = read(3)
    networks = [LayerNetwork(kind, HOSTS.mesh(SQUARE), MICROBATCHES) for kind in layers.kinds]
    first, block, last = networks
    given = block.border_specs(solve(block.priced(0.0, 1.0, {})).choice)
    assert len(given) == 2
    for end in (first, last):
        choice = solve(end.priced(0.0, 1.0, given)).choice
        assert end.border_specs(choice) == given


def test_options_trade_time_for_memory() -> None:
    ((menu,),) = menus([SizedLayers(read(3), MICROBATCHES)], HOSTS, [SQUARE])
    for options in menu.options:
        assert {option.remat for option in options} >= {"none", "all"}
        full = next(option for option in options if option.remat == "none")
        again = next(option for option in options if option.remat == "all")
        assert again.kept_bytes < full.kept_bytes
        assert again.backward_seconds == pytest.approx(full.backward_seconds + full.forward_seconds)
        assert again.kept_bytes + again.working_bytes == pytest.approx(full.kept_bytes + full.working_bytes)


def test_menus_are_the_same_for_any_number_of_processes() -> None:
    sizes = [SizedLayers(read(2), MICROBATCHES)]
    meshes: list[MeshAxes] = [(("data", 1), ("model", 2)), SQUARE]
    assert repr(menus(sizes, HOSTS, meshes, num_workers=2)) == repr(menus(sizes, HOSTS, meshes))


def test_meshes_that_a_smaller_one_beats_are_left_out() -> None:
    shapes = mesh_shapes(HOSTS)
    (found,) = menus([SizedLayers(read(8), MICROBATCHES)], HOSTS, shapes)
    kept = [menu.mesh for menu in found]
    assert kept == [axes for axes in shapes if axes in kept]  # in their order
    assert (("data", 1), ("model", 3)) not in kept  # three devices share no dim of this model
    assert (("data", 1), ("model", 2)) in kept


def test_meshes_lie_within_a_host_or_fill_hosts() -> None:
    shapes = mesh_shapes(HOSTS)
    assert sorted(set(map(num_devices, shapes))) == [1, 2, 3, 4, 8]
    assert (("data", 2), ("model", 2)) in shapes and (("data", 4), ("model", 1)) not in shapes
    assert {axes for axes in shapes if num_devices(axes) == 8} == {
        (("data", 8), ("model", 1)),
        (("data", 4), ("model", 2)),
        (("data", 2), ("model", 4)),
    }
