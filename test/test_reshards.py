"""From every spec of a tensor to every other: the right shards, and as many collectives and bytes as the plan says."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jaxlib.mlir import ir
from op_sweep import bare, mesh_of

from bactrian.driver.xla.compile_stage import compile_functions, signature_shardings
from bactrian.passes.frame.context import make_context
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import MeshAxes, Spec, num_devices
from bactrian.passes.spmd.collective_bytes import count_collectives
from bactrian.passes.spmd.function_partitioner import partition_function
from bactrian.passes.spmd.reshard_paths import ReshardTable, all_specs, reshard_table

_PAIRS = 150  # of a module
_ELEMENT_BYTES = 4
_Pair = tuple[Spec, Spec]

MESHES: tuple[MeshAxes, ...] = (
    (("x", 2), ("y", 2), ("z", 2)),
    (("x", 2), ("y", 3)),
    (("x", 4), ("y", 2)),
    (("x", 2), ("y", 1), ("z", 2)),
)
SHAPES = ((8,), (8, 8), (12, 4), (2, 6), (4, 2, 8))


def _pairs(shape: tuple[int, ...], axes: MeshAxes) -> list[_Pair]:
    specs = all_specs(shape, mesh_of(axes))
    return list(itertools.product(specs, specs))


def _module(shape: tuple[int, ...], axes: MeshAxes, pairs: Sequence[_Pair], table: ReshardTable) -> str:
    """A module with two chains of reshards for each pair: the path of the table, and one reshard that is all of it.

    Each chain begins at an argument of its own, and its number is the location of its reshards.
    """
    type_ = f"tensor<{'x'.join(map(str, shape))}xf32>"
    arguments, lines, results, types = list[str](), list[str](), list[str](), list[str]()
    for number, (source, target) in enumerate(pairs):
        chains = [step.target for step in table.path(source, target)], [target]
        for at, chain in enumerate(chains):
            name = f"%a{number}_{at}"
            arguments.append(f"{name}: {type_} {{sdy.sharding = #sdy.sharding{bare(source)}}}")
            for step, spec in enumerate(chain):
                lines.append(f'%b{number}_{at}_{step} = sdy.reshard {name} {bare(spec)} : {type_} loc("{number}_{at}")')
                name = f"%b{number}_{at}_{step}"
            results.append(name)
            types.append(f"{type_} {{sdy.sharding = #sdy.sharding{bare(target)}}}")
    sizes = ", ".join(f'"{name}"={size}' for name, size in axes)
    body, plain = "\n  ".join(lines), ", ".join([type_] * len(results))
    return (
        f"module @reshards {{\nsdy.mesh @stage0 = <[{sizes}]>\n"
        f"func.func @main({', '.join(arguments)}) -> ({', '.join(types)}) {{\n"
        f"  {body}\n  return {', '.join(results)} : {plain}\n}}\n}}\n"
    )


def _check(shape: tuple[int, ...], axes: MeshAxes, pairs: Sequence[_Pair]) -> None:
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    table = reshard_table(shape, float(_ELEMENT_BYTES * whole.size), mesh_of(axes))
    devices = jax.devices()[: num_devices(axes)]
    with make_context():
        module = ir.Module.parse(_module(shape, axes, pairs, table))
        partition_function(main_function(module), "stage0", axes)
        counted = [Counter[str]() for _ in range(2 * len(pairs))]
        sent = [0.0] * (2 * len(pairs))
        for collective in count_collectives(module.operation):
            found = re.search(r'loc\("(\d+)_(\d)"', collective.where)
            assert found is not None, collective.where
            at = 2 * int(found.group(1)) + int(found.group(2))
            counted[at][collective.kind] += 1
            sent[at] += collective.nbytes
        i32, root = ir.IntegerType.get_signless(32), module.operation.attributes
        root["mhlo.num_partitions"], root["mhlo.num_replicas"] = (
            ir.IntegerAttr.get(i32, count) for count in (len(devices), 1)
        )
        text = str(module)
    for number, (source, target) in enumerate(pairs):
        path = [step for step in table.path(source, target) if step.nbytes]
        assert counted[2 * number] == Counter(step.kind for step in path), (source, target)
        assert sent[2 * number] == pytest.approx(sum(step.nbytes for step in path)), (source, target)
        # Without steps in between, several permutes are one.
        assert sent[2 * number + 1] <= sent[2 * number] * (1 + 1e-9), (source, target)
    function = compile_functions({"main": text}, {"main": devices})["main"]
    places, _ = signature_shardings(text, devices)
    for at, made in enumerate(function(jax.device_put([whole] * len(places), places))):
        for shard in made.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index], err_msg=str(pairs[at // 2]))


@pytest.mark.parametrize(("shape", "axes"), list(itertools.product(SHAPES, MESHES)))
def test_some_reshards_are_right(shape: tuple[int, ...], axes: MeshAxes) -> None:
    pairs = _pairs(shape, axes)
    picked = np.random.default_rng(len(pairs)).permutation(len(pairs))[:24]
    _check(shape, axes, [pairs[number] for number in picked])


@pytest.mark.long
@pytest.mark.parametrize(("shape", "axes"), list(itertools.product(SHAPES, MESHES)))
def test_all_reshards_are_right(shape: tuple[int, ...], axes: MeshAxes) -> None:
    pairs = _pairs(shape, axes)
    for first in range(0, len(pairs), _PAIRS):
        _check(shape, axes, pairs[first : first + _PAIRS])
    print(f"{shape} on {axes}: {len(pairs)} pairs")
