"""The oracle: a captured step as plain JAX on one device, one microbatch after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bactrian.driver.arrays.host_values import gather
from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.capture.jaxpr_dataflow import JaxprDataflow, JaxprOperation


def reference(captured: Captured, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Runs one step and returns its result, of local ``jax.Array``s.

    Takes host or distributed arguments (then all ranks must call it) and donates nothing.
    """
    host_args, host_kwargs = gather((tuple(args), dict(kwargs or {})))
    return reference_function(captured)(*host_args, **host_kwargs)


@functools.lru_cache(maxsize=16)
def reference_function(captured: Captured, *, donate_state: bool = False, unroll: int = 1) -> Callable[..., Any]:
    """The step as one jitted program: a scan over the microbatches, then the update. A fair baseline.

    Args:
        captured: the step.
        donate_state: donate state, as the parallelized step does.
        unroll: microbatches per iteration of the scan.
    """
    donated = tuple(info.number for info in captured.arguments if info.role == "state" and donate_state)

    def run(*leaves: Any) -> list[Any]:
        return _step(captured, list(leaves), unroll)

    run.__name__ = run.__qualname__ = captured.name
    jitted = jax.jit(run, donate_argnums=donated)

    def step(*args: Any, **kwargs: Any) -> Any:
        tree = captured.unflatten(jitted(*captured.flatten(args, kwargs)))
        return captured.returned(tree, args, kwargs)

    return step


def _step(captured: Captured, leaves: list[Any], unroll: int) -> list[Any]:
    flow, count = captured.dataflow, captured.num_microbatches
    batch = [info.number for info in captured.arguments if info.role == "batch"]
    above, below = flow.above(), flow.below()

    def microbatch(index: jax.Array, parts: Sequence[Any]) -> list[Any]:
        inputs = dict(enumerate(leaves)) | dict(zip(batch, parts, strict=True)) | {flow.index: index}
        return _evaluate(flow, above, inputs, flow.boundary.inputs)

    inputs = dict(enumerate(leaves))
    if count == 1:
        inputs[flow.index] = jnp.int32(0)  # what is below the boundary may read it, as it may read the batch
        reduced = microbatch(inputs[flow.index], [leaves[i] for i in batch])
    else:
        cut = [leaves[i].reshape(count, leaves[i].shape[0] // count, *leaves[i].shape[1:]) for i in batch]
        reduced = _reduce_over_microbatches(microbatch, cut, flow.reductions, count, unroll)
    return _evaluate(flow, below, inputs | dict(zip(flow.boundary.outputs, reduced, strict=True)), flow.outputs)


def _reduce_over_microbatches(
    microbatch: Callable[[jax.Array, Sequence[Any]], list[Any]],
    cut: Sequence[Any],
    reductions: Sequence[str],
    count: int,
    unroll: int,
) -> list[Any]:
    """Scans ``microbatch`` over the leading dim of ``cut`` and reduces each of its results."""

    def body(carry: list[Any], xs: tuple[jax.Array, list[Any]]) -> tuple[list[Any], list[Any]]:
        values = microbatch(*xs)
        kept = [_accumulate(*each) for each in zip(carry, values, reductions, strict=True)]
        return kept, [value for value, reduction in zip(values, reductions, strict=True) if reduction == "concat"]

    shapes = jax.eval_shape(microbatch, jax.ShapeDtypeStruct((), jnp.int32), [x[0] for x in cut])
    start = [
        None if reduction == "concat" else jnp.zeros(shape.shape, shape.dtype)
        for shape, reduction in zip(shapes, reductions, strict=True)
    ]
    carry, stacked = jax.lax.scan(body, start, (jnp.arange(count, dtype=jnp.int32), list(cut)), unroll=unroll)
    parts = iter(stacked)
    reduced: list[Any] = []
    for value, reduction in zip(carry, reductions, strict=True):
        if reduction == "concat":
            part = next(parts)
            reduced.append(part.reshape(count * part.shape[1], *part.shape[2:]))
        else:
            reduced.append(value / count if reduction == "mean" else value)
    return reduced


def _accumulate(old: Any, value: Any, reduction: str) -> Any:
    if reduction == "concat":
        return None
    return value if reduction == "last" else old + value


def _evaluate(
    flow: JaxprDataflow, operations: Sequence[JaxprOperation], inputs: Mapping[int, Any], outputs: Sequence[int]
) -> list[Any]:
    """Evaluates operations in order; ``inputs`` are values by number."""
    values = flow.constants | dict(inputs)
    for operation in operations:
        equation = operation.equation
        if not set(operation.outputs).isdisjoint(inputs):
            continue
        params = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            result = equation.primitive.bind(*(values[i] for i in operation.inputs), **params)
        results = result if equation.primitive.multiple_results else (result,)
        values.update(zip(operation.outputs, results, strict=True))
    return [values[i] for i in outputs]
