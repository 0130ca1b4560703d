"""A small step of equal blocks between an embedding and a head, grouped into layers, for tests of the planner."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir

import bactrian
from bactrian.passes import pipelines
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.group_layers import GroupLayers
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.host_group import HostGroup

WIDTH, VOCABULARY, ROWS, LENGTH = 64, 256, 8, 32

HOSTS = HostGroup("small", 2, 4, 1 << 20, Device("small", {"default": 1e11}, 1e10), 1e10, 1e9, intra_host_latency=1e-7)
"""Two hosts of four devices with a MiB each."""


def blocks_step(blocks: int, rows: int = ROWS, microbatches: int = 4, *, tied: bool = False) -> ir.Module:
    """The step with phases: each block adds a two-layer perceptron of its normalized input to it. ``tied``: the head is the
    embedding."""

    def norm(x: jax.Array) -> jax.Array:
        return x - x.mean(-1, keepdims=True)

    def loss(params: Any, batch: Any) -> jax.Array:
        x = params["embedding"][batch["x"]]
        for up, down in params["blocks"]:
            x = x + jax.nn.relu(norm(x) @ up) @ down
        logits = x @ (params["embedding"].T if tied else params["head"])
        chosen = jax.nn.one_hot(batch["y"], VOCABULARY)
        return -(jax.nn.log_softmax(logits) * chosen).sum(-1).mean()

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
        "embedding": array(VOCABULARY, WIDTH),
        "blocks": [(array(WIDTH, 4 * WIDTH), array(4 * WIDTH, WIDTH)) for _ in range(blocks)],
    } | ({} if tied else {"head": array(WIDTH, VOCABULARY)})
    tokens = jax.ShapeDtypeStruct((microbatches * rows, LENGTH), jnp.int32)
    traced = bactrian.parallelize(step, num_microbatches=microbatches).trace(params, {"x": tokens, "y": tokens})
    module = traced.captured.module(None)
    run_pipeline(module, pipelines.import_step())
    return module


def grouped(blocks: int, num_layers: int, epsilon: float = 0.1) -> ir.Module:
    """The step in layers."""
    module = blocks_step(blocks)
    run_pipeline(module, [GroupLayers(num_layers=num_layers, epsilon=epsilon)])
    return module
