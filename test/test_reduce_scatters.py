"""Sums that are scattered: one reduce-scatter in what XLA runs, and the numbers of one device."""

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

from bactrian.driver.xla.compile_stage import compile_function, function_texts
from bactrian.driver.xla.written_reduce_scatters import device_groups
from bactrian.passes.frame.context import make_context
from bactrian.passes.ir.regions import main_function
from bactrian.passes.sharding.scattered_sums import bundles, scattered_sums

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


def scattering(module: ir.Module, seed: int | None) -> int:
    """Write shardings in which every op that can scatters its result, over as many axes as it can or at random; how many do."""
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
    with module.context:
        return len(list(scattered_sums(main_function(module))))


def collectives(module: ir.Module) -> dict[str, int]:
    """How many of XLA's there are."""
    hlo = compile_function(sharded.text_for_xla(module, AXES), jax.devices()[:8]).hlo_modules()[0].to_string()
    return {kind: hlo.count(f" {kind}(") for kind in ("reduce-scatter", "all-reduce")}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_device(name: str) -> None:
    function, arguments = CASES[name]
    expected = jax.tree.leaves(jax.jit(function)(*arguments))
    slack = 2e-2 if name == "bfloat16" else 1e-5
    # With other seeds an image is cut: its borders are sent, and an all-reduce stays.
    for seed in (0, 2) if name == "image" else (None, 0, 2):
        module = sharded.lowered(function, arguments, AXES)
        assert scattering(module, seed) >= 1
        made = collectives(module)
        assert made["reduce-scatter"] >= 1 and not made["all-reduce"]
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


@pytest.mark.parametrize(
    ("target", "number", "fold", "read", "found", "together"),
    [
        ('"x", "y"', "0.0", "add", "%u", 2, 1),
        ('"y", "x"', "0.0", "add", "%u", 2, 1),
        ('"y"', "0.0", "add", "%u", 0, 0),  # only a part of what is added up over both axes is cut
        ('"x", "y"', "1.0", "add", "%u", 1, 1),  # every device would add it
        ('"x", "y"', "0.0", "maximum", "%u", 1, 1),
        ('"x", "y"', "0.0", "add", "%a", 1, 1),  # somebody reads the whole
    ],
)
def test_what_is_a_reduce_scatter(target: str, number: str, fold: str, read: str, found: int, together: int) -> None:
    text = PRODUCT.replace("TARGET", target).replace("NUMBER", number).replace("FOLD", fold).replace("READ", read)
    with make_context():
        module = ir.Module.parse(text)
        sums = list(scattered_sums(main_function(module)))
        assert len(sums) == found and len(bundles(main_function(module), sums, dict(AXES))) == together
        made = collectives(module)
        assert made["reduce-scatter"] == together and bool(made["all-reduce"]) == (found < 2)
        x = arrays((32, 16))[0]
        (result,) = sharded.run(module, AXES, [x])
    if number != "0.0":
        return  # an all-reduce of XLA's adds it eight times, too
    s = (x.max(0, initial=0) if fold == "maximum" else x.sum(0))[:, None]
    expected = x.T @ x + s + (x.T @ x if read == "%a" else s)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "scatters", "constraints"),
    [("cpu", 1, 2), ("gpu", 0, 4), ("tpu", 0, 4), (None, 0, 0)],
)
def test_they_are_written_for_cpus_only(platform: str | None, scatters: int, constraints: int) -> None:
    """XLA for others gets what Shardy gets, a sum and a move: there it makes reduce-scatters, and combines them."""
    text = PRODUCT.replace("TARGET", '"x", "y"').replace("NUMBER", "0.0").replace("FOLD", "add").replace("READ", "%u")
    text = text.replace("public @main", "@stage0.products")
    text = text.replace("}) {\n    %zero", "}) attributes {mesh_shape = #sdy.mesh<[]>} {\n    %zero")
    with make_context():
        (written,) = function_texts(ir.Module.parse(text), platform).values()
    assert written.count("stablehlo.reduce_scatter") == scatters
    assert ("sdy.manual_computation" in written) == bool(scatters)
    # Each of the two sums has a sharding of its own before the one that the move gives it.
    assert written.count("sdy.sharding_constraint") == constraints
    assert written.count("sdy.reshard") == (2 if platform is None else 0)


def test_large_ones_stay_alone() -> None:
    function, _ = CASES["several"]
    for width, count in ((16, 2), (1024, 3)):  # 1 KiB and 4 MiB; the third product needs the others
        shapes = [jax.ShapeDtypeStruct((width, width), np.float32)] * 3
        module = sharded.lowered(function, shapes, AXES)
        assert scattering(module, None) == 3
        with module.context:
            main = main_function(module)
            held = [len(bundle) for bundle in bundles(main, list(scattered_sums(main)), dict(AXES))]
        assert len(held) == count and sum(held) == 3


def test_groups_of_devices() -> None:
    axes = (("x", 2), ("y", 3))
    assert device_groups(axes, ["y"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert device_groups(axes, ["x"]).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert device_groups(axes, ["y", "x"]).tolist() == [[0, 3, 1, 4, 2, 5]]
