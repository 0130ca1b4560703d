"""Capture: a train step and its arguments become one StableHLO module that says everything the passes need.

The module is what ``docs/ir.md`` calls *captured*; what Python needs beside it (trees, static leaves, the jaxpr for the
reference) is kept in ``Captured``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.driver import boundary, dataflow
from bactrian.driver.arrays import Homes
from bactrian.driver.asked import Asked, asked_layouts, write_asked
from bactrian.driver.calls import Call, abstract, flatten_call, is_key, merged, parameters_of, physical
from bactrian.driver.source import line_here
from bactrian.driver.state import Part, match_state
from bactrian.driver.trace_errors import explain_trace_error
from bactrian.passes.errors import BactrianError, ConfigError, ProgramError
from bactrian.passes.frame.context import make_context
from bactrian.passes.program import body, integer, main_function

_NO_MESH = "#sdy.mesh<[]>"
_RANDOM = re.compile("random_bits|threefry|rng_")


@dataclass(frozen=True)
class ArgumentInfo:
    """One array argument of the captured ``@main``.

    ``shape`` is the user's: the full batch for batch leaves, without the key's words for a typed key. ``argnum`` is
    the positional argument of the step that it belongs to, ``None`` for keywords. ``updated_by`` is the number of the
    result that is its next value.
    """

    number: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: str  # "state", "batch", "constant"
    argnum: int | None
    key_impl: Any = None
    updated_by: int | None = None
    weak_type: bool = False

    @property
    def physical(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what stages carry: a typed key is its uint32 words."""
        return physical(self.shape, self.dtype)


@dataclass(frozen=True)
class ResultInfo:
    """One array result of the captured ``@main``; ``updates`` is the argument that it is the next value of."""

    number: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any = None
    updates: int | None = None
    weak_type: bool = False

    @property
    def physical(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what stages carry."""
        return physical(self.shape, self.dtype)


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured step. ``module()`` makes a fresh MLIR module of it in a context of its own."""

    name: str
    bytecode: bytes = field(repr=False)
    fingerprint: str
    platform: str
    num_microbatches: int
    schedule: str
    forward_only: bool
    arguments: tuple[ArgumentInfo, ...] = field(repr=False)
    results: tuple[ResultInfo, ...] = field(repr=False)
    call_signature: tuple[Any, ...] = field(repr=False)
    out_tree: Any = field(repr=False)
    out_statics: tuple[tuple[int, Any], ...] = field(repr=False)
    dataflow: dataflow.Dataflow = field(repr=False)
    parameters: inspect.Signature | None = field(repr=False)
    remarks: tuple[str, ...] = ()

    def module(self, homes: Homes | None = None) -> ir.Module:
        """A module of its own, with locations, that passes may rewrite; ``homes`` says where arguments are already."""
        with make_context(), ir.Location.unknown():
            module = ir.Module.parse(self.bytecode)
            if homes is not None:
                _write_homes(module, homes)
            return module

    @property
    def text(self) -> str:
        """The module as text, with locations."""
        return self.text_with(None)

    def text_with(self, homes: Homes | None) -> str:
        """The module as text, with locations and homes."""
        return str(self.module(homes).operation.get_asm(enable_debug_info=True))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The array leaves of a call, in the order of ``arguments``.

        Raises:
            ProgramError: shapes, dtypes, tree or static leaves differ from what was captured.
        """
        call = flatten_call(self.parameters, args, kwargs or {})
        if call.signature != self.call_signature:
            raise ProgramError(
                f"the arguments of {self.name} are not those it was captured with",
                where=line_here(),
                why=_difference(self, call),
            )
        return call.leaves

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The step's result from its array leaves; static leaves are put back."""
        return jax.tree.unflatten(self.out_tree, merged(list(results), self.out_statics))


def capture(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_argnums: Sequence[int] = (1,),
    num_microbatches: int = 1,
    schedule: str = "1f1b",
    state: Mapping[int, int | None] | None = None,
    forward_only: bool = False,
    out_reduction: Any = "concat",
    platform: str | None = None,
) -> Captured:
    """Traces ``fun`` at microbatch size and lowers it; no device is used.

    Args:
        fun: the train step.
        args, kwargs: its arguments; any leaf with a shape and a dtype is data, abstract ones included.
        batch_argnums: positional arguments whose leaves all have the batch as dim 0.
        num_microbatches: how many parts every batch leaf is cut into.
        schedule: the schedule's name, for the passes.
        state: for some arguments, the index of the result element that is the next value (``None``: read only);
            the others are matched by tree, shapes and dtypes.
        forward_only: ``fun`` takes no gradient; its results are reduced as ``out_reduction`` says.
        out_reduction: one word or a prefix tree of ``mean``, ``sum``, ``last``, ``concat``.
        platform: lower for ``cpu``, ``cuda``, …; JAX's default backend when not given.

    Raises:
        ProgramError: the step can't be run as a pipeline; names the user's line.
        ConfigError: the options do not fit the arguments.
    """
    _check_count(num_microbatches)
    parameters = parameters_of(fun)
    call = flatten_call(parameters, args, kwargs or {})
    batch = _batch_argnums(batch_argnums, len(call.args))
    arguments = _arguments(call, batch, parameters)
    avals = [_microbatch_aval(info, leaf, num_microbatches) for info, leaf in zip(arguments, call.leaves, strict=True)]
    step = _Step(fun, parameters, call, num_microbatches, forward_only, out_reduction)
    traced = step.trace(avals)
    closed = traced.jaxpr.replace(jaxpr=dataflow.without_hints(traced.jaxpr.jaxpr))
    flow = dataflow.flatten(closed)
    results = _results(step, flow, closed)
    _refuse_unreduced(flow, arguments, results)
    if not forward_only:
        arguments, results = _pair_state(step, flow, call, arguments, results, batch, state)
    platform = platform or jax.default_backend()
    lowered = traced.lower(lowering_platforms=(platform,))
    options = {"num_microbatches": num_microbatches, "schedule": schedule}
    asked = asked_layouts(call.leaves)
    bytecode, digest = _annotated(lowered.compiler_ir("stablehlo"), arguments, results, options, asked)
    statics = _static_text((call.tree, call.statics, step.out_tree, step.out_statics, forward_only, platform))
    return Captured(
        name=step.name,
        bytecode=bytecode,
        fingerprint=hashlib.sha256(f"{digest}\n{statics}".encode()).hexdigest(),
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
        remarks=_remarks(step, flow, num_microbatches),
    )


class _Step:
    """The user's function on array leaves; what it returns beside arrays is kept here."""

    out_tree: Any
    out_statics: tuple[tuple[int, Any], ...]
    out_paths: tuple[str, ...]
    key_impls: tuple[Any, ...]
    index_used: bool

    def __init__(
        self,
        fun: Callable[..., Any],
        parameters: inspect.Signature | None,
        call: Call,
        num_microbatches: int,
        forward_only: bool,
        out_reduction: Any,
    ) -> None:
        self.fun, self.parameters, self.call, self.num_microbatches = fun, parameters, call, num_microbatches
        self.forward_only, self.out_reduction = forward_only, out_reduction
        self.name: str = getattr(fun, "__name__", type(fun).__name__)

    def trace(self, avals: Sequence[jax.ShapeDtypeStruct]) -> Any:
        """Traces to a jaxpr; errors of JAX that mean "not traceable" get the user's line."""
        with boundary.capturing(self.num_microbatches, self.forward_only) as mode:

            def flat(*leaves: Any) -> list[Any]:
                return self._run(mode, leaves)

            flat.__name__ = flat.__qualname__ = self.name
            try:
                traced = jax.jit(flat, keep_unused=True).trace(*avals)
            except BactrianError:
                raise
            except Exception as error:
                explained = explain_trace_error(error, self.name, self.num_microbatches)
                if explained is None:
                    raise
                raise explained from error
            self.index_used = mode.index_used
        return traced

    def _run(self, mode: boundary.CaptureMode, leaves: Sequence[Any]) -> list[Any]:
        boundary.trace_index(mode)
        args, kwargs = jax.tree.unflatten(self.call.tree, merged(list(leaves), self.call.statics))
        result = self.fun(*args, **kwargs)
        with_paths, self.out_tree = jax.tree_util.tree_flatten_with_path(result)
        arrays = [(path, leaf) for path, leaf in with_paths if boundary.is_array(leaf)]
        self.out_statics = tuple((i, x) for i, (_, x) in enumerate(with_paths) if not boundary.is_array(x))
        self.out_paths = tuple("result" + jax.tree_util.keystr(path) for path, _ in arrays)
        outputs = [leaf for _, leaf in arrays]
        if self.forward_only:
            words = boundary.tree_reductions(result, self.out_reduction, "out_reduction")
            outputs = boundary.mark(mode, outputs, ["output"] * len(outputs), words)
        self.key_impls = tuple(jax.random.key_impl(x) if is_key(getattr(x, "dtype", None)) else None for x in outputs)
        return outputs


def _check_count(num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches is {num_microbatches}", fix="give a number of 1 or more")


def _batch_argnums(batch_argnums: Sequence[int], num_args: int) -> set[int]:
    for argnum in batch_argnums:
        if not -num_args <= argnum < num_args:
            raise ConfigError(
                f"batch_argnums has {argnum}, but the step was called with {num_args} positional arguments",
                where=line_here(),
                fix="say with batch_argnums which arguments carry the batch; () for none",
            )
    return {argnum % num_args for argnum in batch_argnums}


def _arguments(call: Call, batch: set[int], parameters: inspect.Signature | None) -> list[ArgumentInfo]:
    names = _argument_names(len(call.args), parameters)
    infos: list[ArgumentInfo] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path((call.args, call.kwargs)):
        if not boundary.is_array(leaf):
            continue
        aval = abstract(leaf)
        positional = path[0].idx == 0
        argnum = path[1].idx if positional else None
        name = names[argnum] if argnum is not None else path[1].key
        role = "batch" if argnum in batch else "constant"
        key_impl = jax.random.key_impl(_example_key(aval.dtype)) if is_key(aval.dtype) else None
        text = name + jax.tree_util.keystr(path[2:])
        weak_type = bool(aval.weak_type)
        infos.append(
            ArgumentInfo(len(infos), text, aval.shape, aval.dtype, role, argnum, key_impl, weak_type=weak_type)
        )
    return infos


def _argument_names(count: int, parameters: inspect.Signature | None) -> list[str]:
    names: list[str] = []
    for parameter in parameters.parameters.values() if parameters else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return (names + [f"args[{i}]" for i in range(len(names), count)])[:count]


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


def _results(step: _Step, flow: dataflow.Dataflow, closed: core.ClosedJaxpr) -> list[ResultInfo]:
    infos = [
        ResultInfo(i, path, tuple(aval.shape), aval.dtype, key_impl, weak_type=getattr(aval, "weak_type", False))
        for i, (path, aval, key_impl) in enumerate(zip(step.out_paths, closed.out_avals, step.key_impls, strict=True))
    ]
    assert len(infos) == len(flow.outputs)
    return infos


def _refuse_unreduced(
    flow: dataflow.Dataflow, arguments: Sequence[ArgumentInfo], results: Sequence[ResultInfo]
) -> None:
    """Nothing below the boundary may depend on one microbatch other than through the boundary."""
    batch = [info.number for info in arguments if info.role == "batch"]
    tainted, by = flow.tainted(batch)
    for info, value in zip(results, flow.outputs, strict=True):
        if value not in tainted:
            continue
        below = {i for op in flow.operations if op is flow.boundary for i in op.outputs}
        line = ""
        for operation in flow.operations:  # the first that mixes both sides, else what made the result
            if below.intersection(operation.inputs):
                below.update(operation.outputs)
                if tainted.intersection(operation.inputs):
                    line = operation.line
                    break
        if not line and value in by:
            line = by[value].line
        raise ProgramError(
            f"{info.path} depends on the batch other than through the gradient boundary",
            where=line,
            why="what is below the boundary runs once per step, and each microbatch has a value of its own",
            fix="return it from the loss function as aux (has_aux=True) with an aux_reduction",
        )


def _pair_state(
    step: _Step,
    flow: dataflow.Dataflow,
    call: Call,
    arguments: list[ArgumentInfo],
    results: list[ResultInfo],
    batch: set[int],
    state: Mapping[int, int | None] | None,
) -> tuple[list[ArgumentInfo], list[ResultInfo]]:
    names = _argument_names(len(call.args), step.parameters)
    argument_parts = [
        replace(part, pythonic=_all_numbers(arg))
        for part, arg in zip(_parts(names, call.tree.children()[0], arguments, call.statics), call.args, strict=True)
    ]
    whole = Part.of("result", 0, step.out_tree, results, dict(step.out_statics))
    elements = [whole]
    root = step.out_tree.node_data()
    is_state = any(part.signature == whole.signature for i, part in enumerate(argument_parts) if i not in batch)
    if root is not None and root[0] in (tuple, list) and not is_state:
        names = [f"result[{i}]" for i in range(len(step.out_tree.children()))]
        elements = _parts(names, step.out_tree, results, step.out_statics)
    losses = {out for out, kind in zip(flow.boundary.outputs, flow.kinds, strict=True) if kind == "loss"}
    loss_results = {i for i, value in enumerate(flow.outputs) if value in losses}
    candidates = {i: part for i, part in enumerate(argument_parts) if i not in batch}
    pairs = match_state(candidates, elements, loss_results, flow.dependencies(), state)
    updates: dict[int, int] = {}
    for argnum, index in pairs.items():
        for argument, result in zip(argument_parts[argnum].leaves, elements[index].leaves, strict=True):
            updates[argument.number] = result.number
    updated = {result: argument for argument, result in updates.items()}
    return (
        [replace(a, role="state", updated_by=updates[a.number]) if a.number in updates else a for a in arguments],
        [replace(r, updates=updated.get(r.number)) for r in results],
    )


def _all_numbers(arg: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(arg) if boundary.is_array(leaf)]
    return all(isinstance(leaf, (bool, int, float, complex)) for leaf in leaves)


def _parts(names: Sequence[str], tree: Any, infos: Sequence[Any], statics: Sequence[tuple[int, Any]]) -> list[Part]:
    """The children of the root of ``tree``, each with its own leaves out of ``infos`` and ``statics``."""
    static, rest, start, parts = dict(statics), list(infos), 0, list[Part]()
    for name, child in zip(names, tree.children(), strict=True):
        own = {i - start: static[i] for i in range(start, start + child.num_leaves) if i in static}
        count = child.num_leaves - len(own)
        parts.append(Part.of(name, len(parts), child, rest[:count], own))
        rest, start = rest[count:], start + child.num_leaves
    return parts


def _annotated(
    module: ir.Module,
    arguments: Sequence[ArgumentInfo],
    results: Sequence[ResultInfo],
    options: Mapping[str, int | str],
    asked: Sequence[tuple[int, Asked]],
) -> tuple[bytes, str]:
    """Bytecode of the module with our attributes, and the digest of its text without locations."""
    jax_bytecode = io.BytesIO()
    module.operation.write_bytecode(jax_bytecode)
    with make_context(), ir.Location.unknown():
        ours = ir.Module.parse(jax_bytecode.getvalue())
        number = functools.partial(ir.IntegerAttr.get, ir.IntegerType.get_signless(64))
        for name, value in options.items():
            ours.operation.attributes[f"bactrian.{name}"] = (
                ir.StringAttr.get(value) if isinstance(value, str) else number(value)
            )
        main = next(op for op in ours.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
        block: ir.Block = main.regions[0].blocks[0]
        if len(block.arguments) != len(arguments):
            raise ConfigError(
                f"JAX lowered {len(arguments)} arguments to {len(block.arguments)}",
                fix="switch jax_use_simplified_jaxpr_constants off",
            )
        argument_attrs = _dicts(main, "arg_attrs", len(arguments))
        for info, attrs, argument in zip(arguments, argument_attrs, block.arguments, strict=True):
            attrs["bactrian.role"] = ir.StringAttr.get(info.role)
            argument.set_location(ir.Location.name(info.path))
        write_asked(ours, asked, [len(info.physical.shape) for info in arguments], argument_attrs)
        result_attrs = _dicts(main, "res_attrs", len(results))
        for info, attrs in zip(results, result_attrs, strict=True):
            attrs["jax.result_info"] = ir.StringAttr.get(info.path)
            if info.updates is not None:
                attrs["bactrian.updates"] = number(info.updates)
        for name, dicts in (("arg_attrs", argument_attrs), ("res_attrs", result_attrs)):
            if dicts:
                main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(d) for d in dicts])
        _drop_noise(ours, block)
        text = str(ours.operation.get_asm(enable_debug_info=False))
        bytecode = io.BytesIO()
        ours.operation.write_bytecode(bytecode)
    return bytecode.getvalue(), hashlib.sha256(text.encode()).hexdigest()


def _write_homes(module: ir.Module, homes: Homes) -> None:
    main = main_function(module)
    arguments = _dicts(main, "arg_attrs", len(body(main).arguments))
    for number, stages in homes.stages:
        arguments[number]["bactrian.home"] = ir.ArrayAttr.get([integer(stage) for stage in stages])
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(attrs) for attrs in arguments])
    module.operation.attributes["bactrian.num_stages"] = integer(homes.num_stages)


def _dicts(main: Any, name: str, count: int) -> list[dict[str, ir.Attribute]]:
    if name not in main.attributes:
        return [{} for _ in range(count)]
    return [{item.name: item.attr for item in ir.DictAttr(d)} for d in ir.ArrayAttr(main.attributes[name])]


def _drop_noise(module: ir.Module, main: ir.Block) -> None:
    """Removes the microbatch index when nothing reads it, and JAX's constraints of keys to no mesh at all."""
    index = next(op for op in main.operations if _custom_call_target(op) == boundary.MICROBATCH_INDEX)
    if not any(True for _ in index.results[0].uses):
        index.erase()
    meshes = [op for op in module.body.operations if op.name == "sdy.mesh" and str(op.attributes["mesh"]) == _NO_MESH]
    if not meshes:
        return
    prefixes = tuple(f"#sdy.sharding<@{ir.StringAttr(op.attributes['sym_name']).value}," for op in meshes)
    constraints: list[ir.Operation] = []

    def visit(op: Any) -> ir.WalkResult:
        constraints.append(op.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit, ir.WalkOrder.PRE_ORDER, sdy.ShardingConstraintOp)
    for op in constraints:
        if not str(op.attributes["sharding"]).startswith(prefixes):
            continue
        op.results[0].replace_all_uses_with(op.operands[0])
        op.erase()
    text = str(module.operation.get_asm(enable_debug_info=False, large_elements_limit=0))
    for op, prefix in zip(meshes, prefixes, strict=True):
        if text.count(prefix.removeprefix("#sdy.sharding<").removesuffix(",")) == 1:
            op.erase()


def _custom_call_target(op: Any) -> str:
    return ir.StringAttr(op.attributes["call_target_name"]).value if op.name == "stablehlo.custom_call" else ""


def _remarks(step: _Step, flow: dataflow.Dataflow, num_microbatches: int) -> tuple[str, ...]:
    if num_microbatches == 1 or step.index_used:
        return ()
    for operation in flow.above():
        equation = operation.equation
        inner = (e for jaxpr in dataflow.nested_jaxprs(equation) for e, _ in dataflow.equations(jaxpr))
        if any(_RANDOM.search(e.primitive.name) for e in (equation, *inner)):
            return (
                f"every microbatch gets the same random bits ({operation.line}): "
                "fold bactrian.microbatch_index() into the key if they should differ",
            )
    return ()


def _static_text(value: Any) -> str:
    """A description that is the same in every process: functions by name, objects without their addresses."""
    if isinstance(value, tuple):
        return f"({', '.join(_static_text(item) for item in value)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__qualname__} {value!r}")


def _difference(captured: Captured, call: Call) -> str:
    tree, avals, statics = captured.call_signature
    if tree != call.tree:
        return f"the tree was {tree} and is {call.tree}"
    if statics != call.statics:
        return "static leaves (functions, strings, settings) changed"
    for info, old, new in zip(captured.arguments, avals, call.signature[1], strict=True):
        if old != new:
            return f"{info.path} was {old[1]}{list(old[0])} and is {new[1]}{list(new[0])}"
    return "a static leaf compares unequal to itself"
