"""Ops with windows over sharded dims: halos by numbers, what can be sharded, and whole steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
import sharded
from jax import ShapeDtypeStruct as Shape
from jax import lax
from jaxlib.mlir import ir
from test_known_plans import f32, plan

import bactrian
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.strategies import Strategy
from bactrian.passes.sharding.work_from_ir import Reading
from bactrian.passes.spmd.halo import Halo, halo_sends

GRID = (("x", 2), ("y", 4))
IMAGE = ("NHWC", "HWIO", "NHWC")
# Slow devices: what can be cut is.
SLOW = """
hosts = 1
devices_per_host = 8
memory_gib = 1
peak_tflops = { f32 = 0.02 }
memory_gb_per_s = 2.5
intra_host_gb_per_s = 1.0
intra_host_latency_us = 5
"""


def halo(size: int, **numbers: int) -> Halo:
    """Of one dim of 4-byte elements."""
    rest = {"padding": 0, "dilation": 1} | numbers
    return Halo(0, 0, (size,), 4, rest["advance"], rest["overlap"], rest["padding"], rest["dilation"])


@pytest.mark.parametrize(
    ("made", "parts", "rows", "span"),
    [
        (halo(32, advance=32, overlap=2, padding=1), 8, (1, 1), 6),  # windows of 3
        (halo(32, advance=32, overlap=2, padding=2), 8, (2, 0), 6),  # causal
        (halo(32, advance=32, overlap=0, padding=0), 8, (0, 0), 4),  # 2, with stride 2: each shard has its own
        (halo(32, advance=32, overlap=5, padding=2), 8, (2, 3), 9),  # 7, with stride 2
        (halo(16, advance=32, overlap=2, padding=1, dilation=2), 8, (0, 1), 3),  # 3, of what has zeros in between
        (halo(34, advance=32, overlap=2, padding=0), 2, (1, 1), 18),  # no padding: 17 rows to 16
    ],
)
def test_rows_of_a_halo(made: Halo, parts: int, rows: tuple[int, int], span: int) -> None:
    assert made.rows(parts) == rows
    assert made.span(parts) == span
    assert made.is_near(parts)
    for index in range(parts):  # counted one by one
        held, step = made.shape[0] // parts, made.advance // parts
        read = [
            at // made.dilation
            for at in range(index * step - made.padding, (index + 1) * step + made.overlap - made.padding)
            if at % made.dilation == 0 and 0 <= at // made.dilation < made.shape[0]
        ]
        assert min(read) >= index * held - rows[0]
        assert max(read) < (index + 1) * held + rows[1]


def test_halos_wider_than_a_shard_are_not_exchanged() -> None:
    assert halo(16, advance=16, overlap=4, padding=2).is_near(8)
    assert not halo(16, advance=16, overlap=6, padding=3).is_near(8)
    assert not halo(32, advance=32, overlap=31, padding=31).is_near(8)  # a cumulative sum


def test_the_second_halo_is_as_wide_as_the_first_has_made_it() -> None:
    rows = Halo(0, 0, (16, 32, 8), 4, 16, 2, 1)
    columns = Halo(0, 1, (16, 32, 8), 4, 32, 2, 1)
    parts = [2, 4, 1]
    sent = [send.nbytes for send in halo_sends([rows, columns], lambda _, dim: parts[dim])]
    assert sent == [8 * 8 * 4, 8 * 8 * 4, 10 * 8 * 4, 10 * 8 * 4]


def read(function: Callable[..., Any], *shapes: Shape) -> tuple[ir.Module, Reading, ShardingModel]:
    """The module, whose ops the reading holds, and what is read of it."""
    module = sharded.lowered(function, shapes, GRID)
    return module, *sharded.read(module, GRID)


def of_op(made: tuple[ir.Module, Reading, ShardingModel], name: str) -> list[Strategy]:
    """All strategies of the last op with this name."""
    _, reading, model = made
    found = [
        choices
        for entry, choices in zip(reading.ops, model.strategies, strict=True)
        if reading.flow.ops[entry.index].name == f"stablehlo.{name}" and choices is not None
    ]
    return list(found[-1])


def convolution(stride: int = 1, groups: int = 1) -> Callable[..., jax.Array]:
    return lambda x, k: lax.conv_general_dilated(
        x, k, (stride, stride), "SAME", dimension_numbers=IMAGE, feature_group_count=groups
    )


def pooled(size: int, stride: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), "SAME")


def kernel_gradient(stride: int) -> Callable[..., Any]:
    return lambda x, k, ct: jax.vjp(lambda k: convolution(stride)(x, k), k)[1](ct)[0]


def test_an_image_and_a_kernel_may_both_be_sharded() -> None:
    """Rows over one axis, with halos, and output features, input features or groups over another."""
    found = of_op(read(convolution(), f32(4, 16, 32, 8), f32(3, 3, 8, 16)), "convolution")
    both = [s for s in found if any(s.partial[0].dims[1:3]) and s.operands[1].axes]
    assert {str(s.operands[1]) for s in both} >= {"-,-,-,x", "-,-,-,y", "-,-,x,-", "-,-,y,-"}
    assert all(s.exchanges for s in both)
    plain = of_op(read(convolution(), f32(4, 16, 32, 8), f32(1, 1, 8, 16)), "convolution")
    assert any(any(s.partial[0].dims[1:3]) and s.operands[1].axes for s in plain)
    assert not any(s.exchanges for s in plain)
    grouped = of_op(read(convolution(groups=8), f32(4, 16, 32, 8), f32(3, 3, 1, 16)), "convolution")
    assert any(s.exchanges and s.operands[1].axes for s in grouped)


def test_whole_groups_stay_on_a_device() -> None:
    """Of 2 groups of features 4 devices have no part each; with two axes, the second one shards what is in a group."""
    found = of_op(read(convolution(groups=2), f32(4, 16, 32, 8), f32(3, 3, 4, 16)), "convolution")
    features = {(s.operands[0].dims[3], s.operands[1].dims[3]) for s in found}
    assert features == {((), ()), (("x",), ("x",)), (("x",), ("x", "y")), (("x", "y"), ("x",))}


@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernels_gradient_is_summed_over_rows(stride: int) -> None:
    """The rows of the image and of the result's gradient are sharded over one axis, or both."""
    size = 32 // stride
    found = of_op(
        read(kernel_gradient(stride), f32(4, 32, 32, 8), f32(3, 3, 8, 16), f32(4, size, size, 16)), "convolution"
    )
    cut = [s for s in found if any(s.operands[1].dims[1:3])]  # the gradient of the result is the kernel
    assert {s.operands[1].dims[1:3] for s in cut} >= {(("x",), ()), ((), ("y",)), (("x", "y"), ()), (("x",), ("y",))}
    assert all(s.exchanges and not any(s.partial[0].dims[:2]) for s in cut)


def test_overlapping_windows_of_a_pooling_gradient_stay_whole() -> None:
    def gradient(size: int, stride: int) -> list[Strategy]:
        out = 16 // stride
        made = read(lambda x, ct: jax.vjp(pooled(size, stride), x)[1](ct)[0], f32(4, 16, 16, 8), f32(4, out, out, 8))
        return of_op(made, "select_and_scatter")

    assert not any(any(s.partial[0].dims[1:3]) for s in gradient(3, 1))
    apart = [s for s in gradient(2, 2) if any(s.partial[0].dims[1:3])]
    assert apart
    assert not any(s.exchanges for s in apart)
    assert all(s.operands[0] == s.operands[1] for s in apart)


def test_windows_that_are_filled_up_otherwise_are_cut_both() -> None:
    """A sum and a maximum over the same windows of one image: what is beyond the image is 0 for one, and -inf for the
    other."""
    window, strides = (1, 3, 1), (1, 1, 1)

    def function(x: Any) -> Any:
        most = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
        return most, lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME")

    x = np.random.default_rng(0).uniform(-2, -1, (2, 16, 8)).astype(np.float32)
    module = sharded.lowered(function, (x,), GRID)
    reading, model = sharded.read(module, GRID)
    choice, rows = [0] * len(model.network.costs), 0
    for node, _, choices in model.op_nodes():
        found = [number for number, s in enumerate(choices) if str(s.partial[0]) == "-,y,-"]
        choice[node] = found[0] if found else 0
        rows += bool(found)
    assert rows == 2
    sharded.write(module, reading, model, choice)
    for one, other in zip(sharded.run(module, GRID, (x,)), function(x), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))


def test_images() -> None:
    """One large image: its rows are sharded over all devices, halos of one row go to the neighbours, kernels are everywhere."""

    def loss(kernels: Any, x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jax.nn.relu(convolution()(x, kernel))
        return jnp.square(x).mean()

    solution, specs, sent = plan(loss, [f32(3, 3, 64, 64)] * 3, f32(1, 512, 512, 64), (("data", 8),))
    row = 512 * 64 * 4
    assert specs == (Spec.replicated(4),) * 3
    halos = [c.nbytes for c in sent if c.kind == "collective_permute"]
    assert halos == [row] * 10  # both sides of 3 images, forward and for the kernels' gradients; of 2 gradients
    assert {c.kind for c in sent} == {"collective_permute", "all_reduce"}
    _, _, whole = plan(loss, [f32(3, 3, 64, 64)] * 3, f32(8, 64, 64, 64), (("data", 8),))
    assert {c.kind for c in whole} == {"all_reduce"}  # a batch that can be sharded needs no halos
    assert solution.optimal


def net(state: Any, x: jax.Array) -> jax.Array:
    """Strides, pooling and normalization over the image."""
    for kernel, stride in zip(state["kernels"], (1, 2, 1), strict=True):
        x = jax.nn.relu(convolution(stride)(x, kernel))
        x = x - x.mean((1, 2), keepdims=True)
    x = lax.reduce_window(pooled(2, 2)(x), 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.square(x).mean()


@pytest.mark.parametrize("mesh", ["data=8", pytest.param("data=2,model=4", marks=pytest.mark.long)])
def test_a_step_on_one_image_equals_one_device(mesh: str, tmp_path: Path) -> None:
    """A batch of one is cut along its rows or columns: numbers, bytes by kind against XLA's, and memory."""
    (tmp_path / "cluster.toml").write_text(SLOW)
    random = np.random.default_rng(0)
    shapes = [(3, 3, 3, 8), (3, 3, 8, 8), (3, 3, 8, 16)]
    state = {"kernels": [jnp.asarray(random.normal(size=shape) / 8, jnp.float32) for shape in shapes]}
    image = jnp.asarray(random.normal(size=(1, 64, 64, 3)), jnp.float32)

    def train(state: Any, x: jax.Array) -> Any:
        loss, gradients = bactrian.value_and_grad(net)(state, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients), loss

    step = bactrian.parallelize(train, num_stages=1, mesh=mesh, cluster=str(tmp_path / "cluster.toml"), donate=False)
    planned = step.trace(state, image).plan()
    chosen = planned.plan.stages[0].sharding
    assert chosen is not None
    predicted = dict(chosen.sent_bytes)
    assert predicted["collective_permute"] > 0
    comparison = planned.compare_xla()
    assert comparison.planned == pytest.approx(predicted, abs=2)
    assert not comparison.differences
    numerics.assert_equal_step(bactrian.gather(step(state, image)), step.reference(state, image), ())
