"""flatten-calls on what JAX really lowers: the flat module computes the same bits."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir

from bactrian.passes.frame import pipeline
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.location import name_stack, user_location


def _layer(weight, x):
    return jax.nn.gelu(x @ weight, approximate=False) + jax.nn.relu(x)


def scanned(weight, x):
    y, _ = jax.lax.scan(lambda carry, _: (jax.jit(_layer)(weight, carry), None), x, None, length=3)
    return jnp.sum(jax.jit(_layer)(weight, y))


def branching(weight, x):
    y = jax.lax.cond(x[0, 0] > 0, lambda: _layer(weight, x), lambda: jax.jit(_layer)(weight, -x))
    z = jax.lax.while_loop(lambda v: jnp.sum(v) < 1e3, lambda v: jax.jit(_layer)(jnp.abs(weight), v) + 1.0, y)
    return jnp.sum(z)


def rematerialized(weight, x):
    block = jax.checkpoint(lambda v: jax.nn.softmax(jax.jit(_layer)(weight, v)))
    return jnp.sum(jax.vmap(lambda row: jnp.sort(row))(block(block(x)))[:, 1:] ** 2)


def random_bits(weight, x):
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)
    return jnp.mean(jnp.where(mask, x, 0.0) @ weight)


def _flatten(text: str) -> tuple[str, pipeline.PipelineReport]:
    with make_context():
        module = ir.Module.parse(text)
        report = pipeline.run_pipeline(module, "flatten-calls")
        return str(module), report


def _execute(text: str, *arguments):
    device = jax.devices("cpu")[0]
    devices = _jax.DeviceList((device,))
    with make_context():
        loaded = device.client.compile_and_load(ir.Module.parse(text), devices, xla_client.CompileOptions())
    results = loaded.execute_sharded([jax.device_put(argument, device) for argument in arguments])
    return [np.asarray(arrays[0]) for arrays in results.disassemble_into_single_device_arrays()]


@pytest.mark.parametrize("function", [scanned, branching, rematerialized, random_bits])
def test_the_flat_module_computes_the_same_bits(function) -> None:
    step = jax.jit(function) if function is branching else jax.jit(jax.value_and_grad(function))
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(8, 8)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)
    text = str(step.lower(weight, x).compiler_ir())
    flat, report = _flatten(text)
    assert "call @" not in flat and "chlo." not in flat and flat.count("func.func") == 1
    assert report.runs[0].counts["inlined"] > 0
    for got, wanted in zip(_execute(flat, weight, x), _execute(text, weight, x), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_every_op_of_the_user_keeps_a_line_and_a_name() -> None:
    lowered = jax.jit(jax.grad(scanned)).lower(jnp.ones((8, 8)), jnp.ones((4, 8)))
    text = lowered.compiler_ir().operation.get_asm(enable_debug_info=True)
    with make_context():
        module = ir.Module.parse(text)
        pipeline.run_pipeline(module, "flatten-calls")
        missing: list[str] = []

        def visit(op: ir.Operation) -> ir.WalkResult:
            if op.name == "stablehlo.dot_general":
                assert user_location(op.location).startswith(__file__)
                assert name_stack(op.location).startswith("jit(scanned)/")
            if op.name.startswith("stablehlo.") and not name_stack(op.location):
                missing.append(str(op)[:80])
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
    assert not missing


def test_a_large_module_takes_well_under_a_second() -> None:
    def deep(weight, x):
        for _ in range(200):
            x = jax.jit(_layer)(weight, x)
        return jnp.sum(x)

    text = str(jax.jit(jax.grad(deep)).lower(jnp.ones((8, 8)), jnp.ones((4, 8))).compiler_ir())
    with make_context():
        module = ir.Module.parse(text)
        start = time.process_time()
        report = pipeline.run_pipeline(module, "flatten-calls")
        assert time.process_time() - start < 3.0  # about 0.2 s on a laptop
    assert report.runs[0].counts["inlined"] >= 400
