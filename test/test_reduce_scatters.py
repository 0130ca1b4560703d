"""Sums that are scattered: reduce-scatters in what runs, small ones together, and the numbers of one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax import lax
from jaxlib.mlir import ir

from bactrian.driver.xla.compile_stage import compile_function
from bactrian.passes.frame.context import make_context
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes
from bactrian.passes.spmd.devices import device_groups

AXES = (("x", 2), ("y", 4))


def product(x: Any, y: Any) -> Any:
    return jnp.tensordot(x, y, axes=([0], [0]))


def products(x: Any, y: Any) -> Any:
    return jnp.einsum("bki,bkj->bij", x, y)


def total(x: Any) -> Any:
    return x.sum((0, 2))


def image_weights(x: Any, y: Any) -> Any:
    """A convolution's gradient by its weights."""
    dims = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
    return lax.conv_general_dilated(x, y, (1, 1), [(1, 1), (1, 1)], dimension_numbers=dims)


def embedded(rows: Any, x: Any) -> Any:
    """The gradient of an embedding."""
    return jnp.zeros((16, 8), x.dtype).at[rows].add(x)


def several(x: Any, y: Any, z: Any) -> Any:
    """Two that can be sent together, with a reader of the first one between them, and one that needs both."""
    a = product(x, y)
    b = jnp.sin(a)
    c = product(x, z)
    return b, c, product(jnp.cos(a), jnp.tanh(c))


def looped(x: Any, y: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, z: product(jnp.tanh(x), y) + z / 2, jnp.zeros((16, 32), x.dtype))


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    random = np.random.default_rng(len(shapes))
    return [np.asarray(jnp.asarray(random.uniform(-2, 2, shape)).astype(dtype)) for shape in shapes]


ROWS = np.random.default_rng(0).integers(0, 16, (8, 8)).astype(np.int32)
CASES: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "product": (product, arrays((32, 16), (32, 16))),
    "products": (products, arrays((8, 16, 8), (8, 16, 8))),
    "sum": (total, arrays((8, 32, 8))),
    "image": (image_weights, arrays((8, 4, 4, 8), (8, 4, 4, 16))),
    "embedding": (embedded, [ROWS, *arrays((8, 8, 8))]),
    "several": (several, arrays((32, 16), (32, 16), (32, 16))),
    "loop": (looped, arrays((32, 16), (32, 32))),
    "bfloat16": (product, arrays((8, 16), (8, 16), dtype=jnp.bfloat16)),
    "int32": (product, arrays((32, 16), (32, 16), dtype=np.int32)),
}


def scatter(module: ir.Module, seed: int | None) -> None:
    """Write shardings in which every op that can scatters its result, over as many axes as it can or at random."""
    random = np.random.default_rng(seed)
    reading, model = sharded.read(module, AXES)
    choice = [0] * len(model.problem.inputs)
    for choices in model.strategies:
        if choices is not None:
            kinds = [{each.kind for each in one.reductions} for one in choices]
            best = [number for number, each in enumerate(kinds) if each == {"reduce_scatter"}]
            most = max(best, key=[len(one.reductions) for one in choices].__getitem__, default=0)
            choice.append(int(random.choice(best)) if best and seed is not None else most)
    sharded.write(module, reading, model, choice)


def collectives(module: ir.Module) -> dict[str, int]:
    """How many there are, in the program of one device and as XLA compiles it."""
    local = sharded.partitioned(module, AXES)
    written = [collective.kind for collective in count_collectives(local.operation)]
    hlo = compile_function(str(local), jax.devices()[:8]).hlo_modules()[0].to_string()
    found = {kind: written.count(kind) for kind in ("reduce_scatter", "all_reduce")}
    assert found["reduce_scatter"] == hlo.count(" reduce-scatter(")
    return found


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_device(name: str) -> None:
    function, arguments = CASES[name]
    expected = jax.tree.leaves(jax.jit(function)(*arguments))
    slack = 2e-2 if name == "bfloat16" else 1e-5
    for seed in (None, 0, 2):
        module = sharded.lowered(function, arguments, AXES)
        scatter(module, seed)
        made = collectives(module)
        assert made["reduce_scatter"] >= 1 and not made["all_reduce"]
        for one, other in zip(sharded.run(module, AXES, arguments), expected, strict=True):
            other = np.asarray(other, np.float64)
            np.testing.assert_allclose(one.astype(np.float64), other, rtol=slack, atol=slack * np.abs(other).max())


PRODUCT = """
module @products {
  sdy.mesh @stage0 = <["x"=2, "y"=4]>
  func.func public @main(%x: tensor<32x16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"x", "y"}, {}]>})
      -> (tensor<16x16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{TARGET}, {}]>}) {
    %zero = stablehlo.constant dense<NUMBER> : tensor<f32>
    %a = stablehlo.dot_general %x, %x, contracting_dims = [0] x [0]
      {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<32x16xf32>, tensor<32x16xf32>) -> tensor<16x16xf32>
    %b = sdy.reshard %a <@stage0, [{TARGET}, {}]> : tensor<16x16xf32>
    %s = stablehlo.reduce(%x init: %zero) applies stablehlo.FOLD across dimensions = [0]
      {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}]>]>} : (tensor<32x16xf32>, tensor<f32>) -> tensor<16xf32>
    %t = sdy.reshard %s <@stage0, [{TARGET}]> : tensor<16xf32>
    %u = stablehlo.broadcast_in_dim %t, dims = [0]
      {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{TARGET}, {}]>]>} : (tensor<16xf32>) -> tensor<16x16xf32>
    %c = stablehlo.add %b, %u {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{TARGET}, {}]>]>} : tensor<16x16xf32>
    %d = stablehlo.add %c, READ {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{TARGET}, {}]>]>} : tensor<16x16xf32>
    return %d : tensor<16x16xf32>
  }
}
"""


WHOLE = "    %whole = sdy.reshard %a <@stage0, [{TARGET}, {}]> : tensor<16x16xf32>\n"


@pytest.mark.parametrize(
    ("target", "number", "fold", "read", "scatters", "reduces"),
    [
        ('"x", "y"', "0.0", "add", "%u", 1, 0),  # both sums in one
        ('"y", "x"', "0.0", "add", "%u", 1, 0),
        ('"y"', "0.0", "add", "%u", 0, 2),  # only a part of what is added up over both axes is sharded
        ('"x", "y"', "1.0", "add", "%u", 1, 0),  # and 1 is added once
        ('"x", "y"', "0.0", "maximum", "%u", 1, 1),
        ('"x", "y"', "0.0", "add", "%a", 1, 1),  # somebody reads the whole
    ],
)
def test_what_is_a_reduce_scatter(target: str, number: str, fold: str, read: str, scatters: int, reduces: int) -> None:
    text = PRODUCT.replace("TARGET", target).replace("NUMBER", number).replace("FOLD", fold).replace("READ", read)
    if read == "%a":
        text = text.replace("%c, %a {", "%c, %whole {").replace(
            "    %d =", WHOLE.replace("TARGET", target) + "    %d ="
        )
    with make_context():
        module = ir.Module.parse(text)
        assert collectives(module) == {"reduce_scatter": scatters, "all_reduce": reduces}
        x = arrays((32, 16))[0]
        (result,) = sharded.run(module, AXES, [x])
    s = (x.max(0, initial=float(number)) if fold == "maximum" else x.sum(0) + float(number))[:, None]
    expected = x.T @ x + s + (x.T @ x if read == "%a" else s)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


def test_large_ones_stay_alone() -> None:
    function, _ = CASES["several"]
    for width, count in ((16, 2), (1024, 3)):  # 1 KiB and 4 MiB; the third product needs the others
        shapes = [jax.ShapeDtypeStruct((width, width), np.float32)] * 3
        module = sharded.lowered(function, shapes, AXES)
        scatter(module, None)
        found = count_collectives(sharded.partitioned(module, AXES).operation)
        assert [collective.kind for collective in found if collective.nbytes].count("reduce_scatter") == count
        assert sent_bytes(found)["reduce_scatter"] == 3 * 7 / 8 * width * width * 4  # together or not


def test_groups_of_devices() -> None:
    axes = (("x", 2), ("y", 3))
    assert device_groups(axes, ["y"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert device_groups(axes, ["x"]).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert device_groups(axes, ["y", "x"]).tolist() == [[0, 3, 1, 4, 2, 5]]
