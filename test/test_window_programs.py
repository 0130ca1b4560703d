"""Programs with convolutions and windows that were once wrong on a mesh: random shardings give what one device gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_sharding_numerics import check_program

from bactrian.passes.machine.spec import MeshAxes

MESHES: tuple[MeshAxes, ...] = ((("x", 4),), (("x", 2), ("y", 2)), (("x", 2), ("y", 4)))
Array = jax.Array


def convolved(x: Array, k: Array, stride: int = 1, padding: Any = "SAME", groups: int = 1, **more: Any) -> Array:
    """Features last."""
    count = x.ndim - 2
    dims = ("NHWC", "HWIO", "NHWC") if count == 2 else ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, k, (stride,) * count, padding, dimension_numbers=dims, feature_group_count=groups, **more
    )


def transposed(x: Array, k: Array) -> Array:
    return lax.conv_transpose(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def square(made: Array) -> Array:
    return jnp.mean((jnp.tanh(made) - 0.1) ** 2)


def each_example(k: Array, x: Array) -> Array:
    """The norm of every example's gradient: convolutions with as many groups as examples."""
    one = lambda k, image: jnp.sum(jnp.tanh(convolved(image[None], k)))  # noqa: E731
    gradients = jax.vmap(jax.grad(one), (None, 0))(k, x)
    return jnp.sqrt(jnp.sum(gradients**2, (1, 2, 3, 4)) + 1e-6)


def twice(k: Array, x: Array) -> Any:
    """A penalty on the image's gradient."""
    slope = lambda k, x: jnp.sum(jax.grad(lambda x: square(convolved(x, k, 2)))(x) ** 2)  # noqa: E731
    return jax.grad(slope, (0, 1))(k, x)


def twice_grouped(k: Array, x: Array) -> Any:
    slope = lambda k, x: jnp.sum(jax.grad(lambda k: square(convolved(x, k, groups=4)))(k) ** 2)  # noqa: E731
    return jax.grad(slope, (0, 1))(k, x)


def twice_pooled(x: Array) -> Array:
    def pooled(x: Array) -> Array:
        return square(lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"))

    return jax.grad(lambda x: jnp.sum(jax.grad(pooled)(x) ** 2))(x)


def block(p: Any, x: Array) -> Array:
    """Depthwise, normalized, mixed."""
    z = convolved(x, p["depth"], groups=8)
    z = (z - z.mean(-1, keepdims=True)) * lax.rsqrt(z.var(-1, keepdims=True) + 1e-3)
    return square(x + jax.nn.gelu(z @ p["mix"]))


def causal(p: Any, x: Array) -> Array:
    z = convolved(x, p["depth"], padding=[(3, 0)], groups=8)
    x = x + jax.nn.silu(z) * (x @ p["mix"])
    return square(x + convolved(x, p["wide"], padding=[(4, 0)], rhs_dilation=(2,)))


def hourglass(p: Any, x: Array) -> Array:
    down = jnp.tanh(convolved(x, p["down"], 2))
    up = jnp.tanh(transposed(down, p["up"]))
    return square(jnp.concatenate([up, x], -1) @ p["mix"])


def pools(k: Array, x: Array) -> Array:
    y = jnp.tanh(convolved(x, k))
    most = lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    mean = lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return square(jax.image.resize(most + mean, x.shape[:3] + k.shape[-1:], "bilinear"))


def patches(k: Array, x: Array) -> Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return square(lax.conv_general_dilated_patches(x, (2, 2), (2, 2), "VALID", dimension_numbers=dims) @ k)


def stencil(x: Array) -> Array:
    """Periodic, and transposed."""

    def second(x: Array) -> Array:
        return sum((jnp.roll(x, step, axis) for step in (1, -1) for axis in (0, 1)), -4 * x)

    (back,) = jax.linear_transpose(second, x)(second(x))
    return square(x + 0.1 * back)


def pads(x: Array) -> Array:
    """Two concatenations that share a negative pad."""
    zero = jnp.float32(0)
    cut = lambda low, high: lax.pad(x, zero, [(low, high, 0), (0, 0, 0)])  # noqa: E731
    one = jnp.concatenate([cut(-3, 0), cut(0, -5)])
    return square(one * jnp.concatenate([cut(-5, 0), cut(0, -3)]))


def gradient(loss: Callable[..., Array]) -> Callable[..., Any]:
    return jax.value_and_grad(loss)


Shapes = Any
IMAGE, ROWS = (8, 8, 8, 8), (4, 16, 8)
PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Shapes, ...]]] = {
    "gradients of each example": (each_example, ((3, 3, 2, 4), (8, 8, 8, 2))),
    "gradients of each example, windows of one": (each_example, ((1, 1, 2, 4), (8, 8, 8, 2))),
    "double gradient": (twice, ((3, 3, 2, 4), (4, 8, 8, 2))),
    "double gradient of groups": (twice_grouped, ((3, 3, 2, 8), (4, 8, 8, 8))),
    "double gradient of maxima": (twice_pooled, ((4, 8, 8, 4),)),
    "depthwise": (gradient(block), ({"depth": (5, 5, 1, 8), "mix": (8, 8)}, IMAGE)),
    "groups": (gradient(lambda k, x: square(convolved(x, k, groups=4))), ((3, 3, 2, 8), IMAGE)),
    "more features than groups": (
        gradient(lambda k, x: square(convolved(x, k, groups=4, padding="VALID"))), ((3, 3, 1, 12), (8, 10, 10, 4)),
    ),
    "causal and dilated": (gradient(causal), ({"depth": (4, 1, 8), "mix": (8, 8), "wide": (3, 8, 8)}, ROWS)),
    "transposed": (gradient(hourglass), ({"down": (3, 3, 4, 8), "up": (2, 2, 8, 4), "mix": (8, 4)}, (4, 16, 8, 4))),
    "pools and resizes": (gradient(pools), ((3, 3, 4, 8), (4, 8, 8, 4))),
    "patches": (gradient(patches), ((12, 8), (8, 8, 8, 3))),
    "stencil": (gradient(stencil), ((8, 8),)),
    "negative pads": (gradient(pads), ((8, 4),)),
}  # fmt: skip


def check(name: str, seed: int) -> None:
    function, shapes = PROGRAMS[name]
    random = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda each: isinstance(each, tuple) and isinstance(each[0], int))
    arguments = [random.normal(size=shape).astype(np.float32) / 4 for shape in leaves]

    def flat(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves))

    check_program(flat, arguments, MESHES[seed % len(MESHES)], seed)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_equal_one_device(name: str) -> None:
    for seed in range(2):
        check(name, seed)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_under_many_shardings_equal_one_device(name: str) -> None:
    for seed in range(40):
        check(name, seed)
