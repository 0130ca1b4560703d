"""Capture: a train step and its arguments become one StableHLO module that says everything the passes need.

The module is what ``docs/ir.md`` calls *captured*; what Python needs beside it (trees, static leaves, the jaxpr for the
reference) is kept in ``Captured``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bactrian.driver.arrays.leaf_types import array_positions, is_array, is_key
from bactrian.driver.capture import gradient_boundary, jaxpr_dataflow
from bactrian.driver.capture.argument_info import ArgumentInfo, ResultInfo
from bactrian.driver.capture.argument_shardings import requested_shardings
from bactrian.driver.capture.batch_hint import DEFAULT_BATCH, BatchHint
from bactrian.driver.capture.boundary_checks import refuse_gradients_of_rows, refuse_unreduced, refuse_unused_gradients
from bactrian.driver.capture.call_signature import (
    FlatCall,
    Parameters,
    StaticArgument,
    abstract,
    argument_names,
    flatten_call,
    named_leaves,
)
from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.capture.jaxpr_rewriting import without_axis, without_hints
from bactrian.driver.capture.module_attributes import annotated
from bactrian.driver.capture.state_matching import StepPart, check_unchanged, match_state
from bactrian.driver.capture.trace_errors import explain_trace_error
from bactrian.driver.capture.updated_in_place import Snapshot
from bactrian.driver.source import line_here, line_of_function
from bactrian.passes.frame.errors import BactrianError, ConfigError, ProgramError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.schedules.by_name import DEFAULT_SCHEDULE
from bactrian.runtime.rank_lifecycle import drop_note_of_jax

_RANDOM = re.compile("random_bits|threefry|rng_")


def capture(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_argnums: Sequence[int] | None = None,
    num_microbatches: int = 1,
    schedule: str = DEFAULT_SCHEDULE,
    state: Mapping[int, int | None] | None = None,
    forward_only: bool = False,
    out_reduction: Any = "concat",
    parameters: Parameters | None = None,
    axis_name: str | None = None,
    platform: str | None = None,
) -> Captured:
    """Traces ``fun`` at microbatch size and lowers it; no device is used.

    Args:
        fun: the train step.
        args, kwargs: its arguments; any leaf with a shape and a dtype is data, abstract ones included.
        batch_argnums: positional arguments whose leaves all have the batch as dim 0; argument 1 by default.
        num_microbatches, schedule: how many microbatches every batch leaf is split into, and the order they run in.
        state: by argument, the result that is its next value (``None``: read only); others are matched by their trees.
        forward_only: ``fun`` takes no gradient; its results are reduced as ``out_reduction`` says, one word or a prefix
            tree of ``mean``, ``sum``, ``last``, ``concat``.
        parameters: those of ``fun``, where some are static.
        axis_name: an axis that ``fun`` uses as ``jax.pmap`` binds it; it gets one device, with the whole batch.
        platform: lower for ``cpu``, ``cuda``, …; JAX's default backend when not given.

    Raises:
        ProgramError: the step can't be run as a pipeline; names the user's line.
        ConfigError: the options do not fit the arguments.
    """
    parameters = parameters or Parameters.of(fun)
    call = flatten_call(parameters, args, kwargs or {})
    batch = _batch_argnums((DEFAULT_BATCH,) if batch_argnums is None else batch_argnums, call.args)
    step = _Step(fun, parameters, call, num_microbatches, forward_only, out_reduction, axis_name)
    hint = BatchHint.of(call.args, argument_names(len(call.args), parameters)) if batch_argnums is None else None
    traced, flow, arguments, results = _trace(step, _arguments(call, batch, parameters), batch, state, hint)
    platform = platform or jax.default_backend()
    bytecode, fingerprint = _lower(step, traced, arguments, results, schedule, platform)
    return Captured(
        name=step.name,
        bytecode=bytecode,
        fingerprint=fingerprint,
        platform=platform,
        num_microbatches=num_microbatches,
        schedule=schedule,
        forward_only=forward_only,
        arguments=tuple(arguments),
        results=tuple(results),
        call_signature=call.signature,
        out_tree=step.out_tree,
        out_statics=step.out_statics,
        dataflow=flow,
        parameters=parameters,
        updated=step.updated,
        remarks=_remarks(step, flow, num_microbatches),
        phases=step.clock.phases,
    )


class _Step:
    """The user's function on array leaves; what it returns beside arrays is kept here.

    With arguments that are updated in place, the result is a pair: what the function returns, and these arguments.
    """

    updated: tuple[int, ...]
    out_tree: Any
    out_statics: tuple[tuple[int, Any], ...]
    out_paths: tuple[str, ...]
    key_impls: tuple[Any, ...]
    index_used: bool

    def __init__(
        self,
        fun: Callable[..., Any],
        parameters: Parameters,
        call: FlatCall,
        num_microbatches: int,
        forward_only: bool,
        out_reduction: Any,
        axis_name: str | None,
    ) -> None:
        _check_count(num_microbatches)
        self.fun, self.parameters, self.call, self.num_microbatches = fun, parameters, call, num_microbatches
        self.forward_only, self.out_reduction, self.axis_name = forward_only, out_reduction, axis_name
        self.name: str = getattr(fun, "__name__", type(fun).__name__)
        self.clock = PhaseClock()

    def trace(self, arguments: Sequence[ArgumentInfo]) -> Any:
        """Traces to a jaxpr; errors of JAX that mean "not traceable" get the user's line."""
        leaves = list(zip(arguments, self.call.leaves, strict=True))
        avals = [_microbatch_aval(info, leaf, self.num_microbatches) for info, leaf in leaves]
        with gradient_boundary.capturing(self.num_microbatches, self.forward_only) as mode:

            def flat(*leaves: Any) -> list[Any]:
                pairs = zip(arguments, leaves, strict=True)
                mode.arguments = {id(leaf): (leaf, info.role == "batch") for info, leaf in pairs}
                return self._run(mode, leaves)

            try:
                traced = self._jitted(flat, avals).trace(*avals)
            except Exception as error:
                drop_note_of_jax(error)
                if isinstance(error, BactrianError):
                    raise
                numbers = {
                    info.number: (info.path, type(leaf))
                    for info, leaf in leaves
                    if isinstance(leaf, (bool, int, float, complex))
                }
                explained = explain_trace_error(error, self.name, self.num_microbatches, numbers)
                if explained is None:
                    raise
                raise explained from error
            self.index_used = mode.index_used
        return traced

    def _jitted(self, flat: Callable[..., list[Any]], avals: Sequence[jax.ShapeDtypeStruct]) -> Any:
        """``flat`` as a jitted function with the step's name, and without the axis that it is mapped over."""
        if self.axis_name is not None:
            mapped = jax.make_jaxpr(flat, axis_env=[(self.axis_name, 1)])(*avals)
            flat = core.jaxpr_as_fun(without_axis(mapped, self.axis_name))

        def step(*leaves: Any) -> list[Any]:
            return flat(*leaves)

        step.__name__ = step.__qualname__ = self.name
        return jax.jit(step, keep_unused=True)

    def _run(self, mode: gradient_boundary.CaptureMode, leaves: Sequence[Any]) -> list[Any]:
        gradient_boundary.trace_index(mode)
        args, kwargs = self.call.arguments(leaves)
        before = Snapshot(args)
        result = self.fun(*args, **kwargs)
        self.updated = () if self.forward_only else before.updated(result)
        if self.updated:
            result = result, tuple(args[argnum] for argnum in self.updated)
        with_paths, self.out_tree = jax.tree_util.tree_flatten_with_path(result)
        data = array_positions([leaf for _, leaf in with_paths], self.out_tree)
        arrays = [with_paths[i] for i in data]
        self.out_statics = tuple((i, x) for i, (_, x) in enumerate(with_paths) if i not in set(data))
        self.out_paths = tuple(self._path(path) for path, _ in arrays)
        outputs = [leaf for _, leaf in arrays]
        if self.forward_only:
            words = gradient_boundary.tree_reductions(result, self.out_reduction, "out_reduction")
            outputs = gradient_boundary.mark(mode, outputs, ["output"] * len(outputs), words)
        self.key_impls = tuple(jax.random.key_impl(x) if is_key(getattr(x, "dtype", None)) else None for x in outputs)
        return outputs

    def _path(self, path: Sequence[Any]) -> str:
        """The user's name of a leaf of the result."""
        if not self.updated:
            return "result" + jax.tree_util.keystr(tuple(path))
        if path[0].idx == 0:
            return "result" + jax.tree_util.keystr(tuple(path[1:]))
        names = argument_names(len(self.call.args), self.parameters)
        return names[self.updated[path[1].idx]] + jax.tree_util.keystr(tuple(path[2:]))


def _lower(
    step: _Step,
    traced: Any,
    arguments: Sequence[ArgumentInfo],
    results: Sequence[ResultInfo],
    schedule: str,
    platform: str,
) -> tuple[bytes, str]:
    """Bytecode of the lowered module with our attributes, and the program's fingerprint."""
    call = step.call
    with step.clock.phase("lower"):
        module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
        options = {"num_microbatches": step.num_microbatches, "schedule": schedule}
        shardings, line = requested_shardings(call.leaves), line_of_function(step.fun)
        bytecode, digest = annotated(module, arguments, results, options, shardings, line)
    statics = _static_text((call.tree, call.statics, step.out_tree, step.out_statics, step.forward_only, platform))
    return bytecode, hashlib.sha256(f"{digest}\n{statics}".encode()).hexdigest()


def _check_count(num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches is {num_microbatches}", fix="give a number of 1 or more")


def _batch_argnums(batch_argnums: Sequence[int], args: Sequence[Any]) -> set[int]:
    num_args = len(args)
    for argnum in batch_argnums:
        if not -num_args <= argnum < num_args:
            raise ConfigError(
                f"batch_argnums has {argnum}, but the step was called with {num_args} positional arguments",
                where=line_here(),
                fix="say with batch_argnums which arguments carry the batch; () for none",
            )
        if isinstance(args[argnum], StaticArgument):
            raise ConfigError(
                f"argument {argnum % num_args} is static, and in batch_argnums",
                where=line_here(),
                fix="say with batch_argnums which arguments carry the batch; it is 1 by default",
            )
    return {argnum % num_args for argnum in batch_argnums}


def _arguments(call: FlatCall, batch: set[int], parameters: Parameters) -> list[ArgumentInfo]:
    infos: list[ArgumentInfo] = []
    for path, argnum, leaf in named_leaves(call, parameters):
        aval = abstract(leaf)
        role = "batch" if argnum in batch else "constant"
        key_impl = jax.random.key_impl(_example_key(aval.dtype)) if is_key(aval.dtype) else None
        weak_type = bool(aval.weak_type)
        infos.append(
            ArgumentInfo(len(infos), path, aval.shape, aval.dtype, role, argnum, key_impl, weak_type=weak_type)
        )
    return infos


def _example_key(dtype: Any) -> Any:
    """A key array of a key dtype; only its dtype is looked at."""
    return jnp.empty((), dtype)


def _microbatch_aval(info: ArgumentInfo, leaf: Any, num_microbatches: int) -> jax.ShapeDtypeStruct:
    aval = abstract(leaf)
    if info.role != "batch":
        return aval
    if not info.shape:
        raise ProgramError(
            f"batch argument {info.path} is a scalar",
            where=line_here(),
            why=f"every leaf of a batch argument is cut into {num_microbatches} microbatches along dim 0",
            fix="pass it as an argument that is not in batch_argnums",
        )
    if info.shape[0] % num_microbatches:
        raise ProgramError(
            f"batch argument {info.path} has {info.shape[0]} rows, which {num_microbatches} microbatches do not divide",
            where=line_here(),
            fix=f"use a batch of a multiple of {num_microbatches}, or another num_microbatches",
        )
    return jax.ShapeDtypeStruct(
        (info.shape[0] // num_microbatches, *info.shape[1:]), aval.dtype, weak_type=aval.weak_type
    )


def _trace(
    step: _Step,
    arguments: list[ArgumentInfo],
    batch: set[int],
    state: Mapping[int, int | None] | None,
    hint: BatchHint | None,
) -> tuple[Any, jaxpr_dataflow.JaxprDataflow, list[ArgumentInfo], list[ResultInfo]]:
    """The step traced at the size of a microbatch, what it computes from what, its arguments with roles, and its results.

    Raises:
        ProgramError: there is no gradient boundary, or something goes around it, or nothing comes of the gradients.
    """
    with step.clock.phase("trace"), hint.added(step.name) if hint is not None else nullcontext():
        traced = step.trace(arguments)
        closed = traced.jaxpr.replace(jaxpr=without_hints(traced.jaxpr.jaxpr))
        flow = jaxpr_dataflow.flatten(closed)
        results = _results(step, flow, closed)
        if step.num_microbatches > 1:
            refuse_unreduced(flow, arguments, results, str(line_of_function(step.fun) or ""))
            refuse_gradients_of_rows(flow, arguments, step.num_microbatches)
        refuse_unused_gradients(flow)
    if not step.forward_only:
        arguments, results = _pair_state(step, flow, arguments, results, batch, state, hint)
    return traced, flow, arguments, results


def _results(step: _Step, flow: jaxpr_dataflow.JaxprDataflow, closed: core.ClosedJaxpr) -> list[ResultInfo]:
    infos = [
        ResultInfo(i, path, tuple(aval.shape), aval.dtype, key_impl, weak_type=getattr(aval, "weak_type", False))
        for i, (path, aval, key_impl) in enumerate(zip(step.out_paths, closed.out_avals, step.key_impls, strict=True))
    ]
    assert len(infos) == len(flow.outputs)
    return infos


def _pair_state(
    step: _Step,
    flow: jaxpr_dataflow.JaxprDataflow,
    arguments: list[ArgumentInfo],
    results: list[ResultInfo],
    batch: set[int],
    state: Mapping[int, int | None] | None,
    hint: BatchHint | None,
) -> tuple[list[ArgumentInfo], list[ResultInfo]]:
    call = step.call
    names = argument_names(len(call.args), step.parameters)
    argument_parts = [
        replace(part, pythonic=_all_numbers(arg))
        for part, arg in zip(_parts(names, call.tree.children()[0], arguments, call.statics), call.args, strict=True)
    ]
    whole = StepPart.of("result", 0, step.out_tree, results, dict(step.out_statics))
    in_place = list[StepPart]()
    if step.updated:
        whole, objects = _parts(["result", "updated"], whole.tree, whole.leaves, whole.statics)
        in_place = _parts([names[argnum] for argnum in step.updated], objects.tree, objects.leaves, objects.statics)
    elements = [whole]
    root = whole.tree.node_data()
    is_state = any(part.signature == whole.signature for i, part in enumerate(argument_parts) if i not in batch)
    if root is not None and root[0] in (tuple, list) and not is_state:
        names = [f"result[{i}]" for i in range(len(whole.tree.children()))]
        elements = _parts(names, whole.tree, whole.leaves, whole.statics)
    if hint is not None:
        hint.refuse_returned(argument_parts, elements, flow.dependencies())
    losses = {out for out, kind in zip(flow.boundary.outputs, flow.kinds, strict=True) if kind == "loss"}
    loss_results = {i for i, value in enumerate(flow.outputs) if value in losses}
    candidates = {i: part for i, part in enumerate(argument_parts) if i not in {*batch, *step.updated}}
    pairs = match_state(candidates, elements, loss_results, flow.dependencies(), state)
    nexts = {argnum: elements[index] for argnum, index in pairs.items()}
    nexts.update(zip(step.updated, in_place, strict=True))
    updates: dict[int, int] = {}
    for argnum, element in nexts.items():
        check_unchanged(argument_parts[argnum], element)
        for argument, result in zip(argument_parts[argnum].leaves, element.leaves, strict=True):
            updates[argument.number] = result.number
    updated = {result: argument for argument, result in updates.items()}
    return (
        [replace(a, role="state", updated_by=updates[a.number]) if a.number in updates else a for a in arguments],
        [replace(r, updates=updated.get(r.number)) for r in results],
    )


def _all_numbers(arg: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(arg) if is_array(leaf)]
    return all(isinstance(leaf, (bool, int, float, complex)) for leaf in leaves)


def _parts(names: Sequence[str], tree: Any, infos: Sequence[Any], statics: Sequence[tuple[int, Any]]) -> list[StepPart]:
    """The children of the root of ``tree``, each with its own leaves out of ``infos`` and ``statics``."""
    static, rest, start, parts = dict(statics), list(infos), 0, list[StepPart]()
    for name, child in zip(names, tree.children(), strict=True):
        own = {i - start: static[i] for i in range(start, start + child.num_leaves) if i in static}
        count = child.num_leaves - len(own)
        parts.append(StepPart.of(name, len(parts), child, rest[:count], own))
        rest, start = rest[count:], start + child.num_leaves
    return parts


def _remarks(step: _Step, flow: jaxpr_dataflow.JaxprDataflow, num_microbatches: int) -> tuple[str, ...]:
    if num_microbatches == 1 or step.index_used:
        return ()
    for operation in flow.above():
        equation = operation.equation
        inner = (e for jaxpr in jaxpr_dataflow.nested_jaxprs(equation) for e, _ in jaxpr_dataflow.equations(jaxpr))
        if any(_RANDOM.search(e.primitive.name) for e in (equation, *inner)):
            return (
                f"every microbatch gets the same random bits ({operation.line}): "
                "fold bactrian.microbatch_index() into the key if they should differ",
            )
    return ()


def _static_text(value: Any) -> str:
    """A description that is the same in every process: functions by name, objects without their addresses."""
    if isinstance(value, StaticArgument):
        return _static_text(value.value)
    if isinstance(value, tuple):
        return f"({', '.join(_static_text(item) for item in value)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__qualname__} {value!r}")
