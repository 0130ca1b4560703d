"""Plans that people have found are found without being told, in the collectives that Shardy makes of the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sharded
from jax import ShapeDtypeStruct as Shape
from jaxlib.mlir import ir

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.ir.attributes import integer
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster_file import cluster_of
from bactrian.passes.machine.spec import MeshAxes, Spec
from bactrian.passes.network.solver import Solution, solve
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.spmd.collective_bytes import Collective, count_collectives

HOST = cluster_of(
    {
        "hosts": 1,
        "devices_per_host": 8,
        "memory_gib": 80,
        "peak_tflops": {"bf16": 989, "f32": 67},
        "memory_gb_per_s": 3350,
        "intra_host_gb_per_s": 450,
    },
    name="h100",
).only_group("a test")


def f32(*shape: int) -> Shape:
    return Shape(shape, jnp.float32)


def plan(
    loss: Callable[[Any, Any], jax.Array],
    state: Any,
    batch: Any,
    axes: MeshAxes,
    memory: int | None = None,
    batch_sharding: str | None = None,
) -> tuple[Solution, Sequence[Spec], list[Collective]]:
    """A step of gradient descent, solved: the solution, the specs of the state, and what is sent."""

    def step(state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients), value

    module = sharded.lowered(step, (state, batch), axes)
    count = len(jax.tree.leaves(state))
    with module.context:
        main = main_function(module)
        results = [ir.DictAttr.get({"bactrian.updates": integer(number)}) for number in range(count)]
        main.attributes["res_attrs"] = ir.ArrayAttr.get([*results, ir.DictAttr.get({})])
        role = ir.StringAttr.get
        arguments = [{"bactrian.role": role("state")}] * count + [{"bactrian.role": role("batch")}]
        if batch_sharding is not None:
            arguments[-1]["sdy.sharding"] = ir.Attribute.parse(f"#sdy.sharding<@stage0, {batch_sharding}>")
        main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in arguments])
    reading, model = sharded.read(module, axes, HOST)
    model = ShardingModel(reading.problem, model.mesh, memory)
    solution = solve(model.network, 60.0)
    assert solution.optimal
    sharded.write(module, reading, model, solution.choice)
    sent = [
        collective for collective in count_collectives(sharded.partitioned(module, axes).operation) if collective.nbytes
    ]
    arguments = model.shardings(solution.choice).arguments
    return solution, tuple(arguments[number] for number in range(count)), sent


def mlp(weights: Any, x: jax.Array) -> jax.Array:
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return jnp.square(x).mean()


def block(p: Any, x: jax.Array) -> jax.Array:
    """A transformer block without masks, and its mean square."""

    def normal(x: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)

    y = normal(x)
    q, k, v = (jnp.einsum("bsd,dhe->bshe", y, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bshe,bthe->bhst", q, k) * 0.1)
    x = x + jnp.einsum("bshe,hed->bsd", jnp.einsum("bhst,bthe->bshe", weights, v), p["o"])
    x = x + jax.nn.gelu(normal(x) @ p["f"]) @ p["g"]
    return jnp.square(x).mean()


def test_data_parallel() -> None:
    """Many rows and small weights: the rows are cut, each gradient is reduced once, and so is the loss."""
    _, state, sent = plan(mlp, [f32(256, 256)] * 3, f32(65536, 256), (("data", 8),))
    assert state == (Spec.replicated(2),) * 3
    assert Counter(c.kind for c in sent) == {"all_reduce": 4}
    assert sorted(c.nbytes for c in sent)[1:] == [2 * 7 / 8 * 256 * 256 * 4] * 3


def test_megatron() -> None:
    """One short sequence: heads and features are cut; two all-reduces of the activations forward, and backward one,
    since nothing asks for the gradient of the block's own input."""
    width, length = 2048, 512
    state = {name: f32(width, 8, width // 8) for name in "qkv"}
    state |= {"o": f32(8, width // 8, width), "f": f32(width, 4 * width), "g": f32(4 * width, width)}
    _, specs, sent = plan(block, state, f32(1, length, width), (("model", 4),))
    by_name = {name: str(spec) for name, spec in zip(sorted(state), specs, strict=True)}
    assert by_name == {
        "f": "-,model",
        "g": "model,-",
        "k": "-,model,-",
        "o": "model,-,-",
        "q": "-,model,-",
        "v": "-,model,-",
    }
    assert [(c.kind, c.nbytes) for c in sent] == [("all_reduce", 2 * 3 / 4 * length * width * 4)] * 3


def test_zero_when_memory_is_short() -> None:
    """The less memory, the more of the state is cut over the data axis: gathered to be used, gradients scattered."""
    problem = mlp, [f32(1024, 1024)] * 8, f32(16384, 1024), (("data", 8),)
    plenty, specs, _ = plan(*problem)
    assert specs == (Spec.replicated(2),) * 8
    costs, cut = [plenty.cost], [0]
    for memory in (100 << 20, 85 << 20):
        solution, specs, sent = plan(*problem, memory=memory)
        assert solution.memory <= memory
        costs.append(solution.cost)
        cut.append(sum(not spec.is_replicated for spec in specs))
        kinds = Counter(c.kind for c in sent)
        assert kinds["reduce_scatter"] >= cut[-1] - 1
        assert kinds["all_gather"] >= cut[-1] - 1
    assert costs == sorted(costs)
    assert cut[0] < cut[1] < cut[2]
    assert cut[2] >= 6
    with pytest.raises(InfeasiblePlanError, match="no choice fits"):
        plan(*problem, memory=60 << 20)


def test_experts() -> None:
    """A mixture of experts on tokens that are cut: every device has experts, tokens go there and back all to all."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(jnp.einsum("gsd,de->gse", x, p["router"]))
        tokens = jnp.einsum("gse,gsd->egsd", gates, x)[:, :, : x.shape[1] // 8]
        hidden = jax.nn.relu(jnp.einsum("egsd,edf->egsf", tokens, p["up"]))
        back = jnp.einsum("egsf,efd->gsd", hidden, p["down"])
        return jnp.square(back).mean()

    state = {"router": f32(256, 8), "up": f32(8, 256, 4096), "down": f32(8, 4096, 256)}
    _, specs, sent = plan(loss, state, f32(8, 1024, 256), (("x", 8),), batch_sharding='[{"x"}, {}, {}]')
    assert specs[0] == specs[2] == Spec.parse("x,-,-")
    assert "all_to_all" in {c.kind for c in sent}


def test_convolutions() -> None:
    """The images are cut, kernels are everywhere."""

    def loss(kernels: Any, x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x)
        return jnp.square(x).mean()

    _, specs, sent = plan(loss, [f32(3, 3, 64, 64)] * 3, f32(64, 32, 32, 64), (("data", 8),))
    assert specs == (Spec.replicated(4),) * 3
    assert Counter(c.kind for c in sent) == {"all_reduce": 4}


def test_sequences() -> None:
    """One long sequence, one head: its rows are cut and every device attends with its own queries. What keys and values are
    made of is gathered, their gradients are scattered, and weights are whole."""
    width, length = 64, 8192
    state = {name: f32(width, 1, width) for name in "qkv"} | {"o": f32(1, width, width)}
    state |= {"f": f32(width, 4 * width), "g": f32(4 * width, width)}
    _, specs, sent = plan(block, state, f32(1, length, width), (("x", 8),), batch_sharding='[{}, {"x"}, {}]')
    assert all(spec.is_replicated for spec in specs)
    whole = 7 / 8 * length * width * 4
    assert Counter(c.kind for c in sent if c.nbytes == whole) == {"all_gather": 1, "reduce_scatter": 2}
    assert all(c.nbytes < whole / 10 for c in sent if c.nbytes != whole)
