"""Rewriting of jaxprs, nested ones included: without hints about devices, and without the axis of a pmapped step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bactrian.driver.capture.gradient_boundary import STAGE_BOUNDARY
from bactrian.driver.capture.jaxpr_dataflow import equations, is_call, is_jit

_SHARDINGS = ("in_shardings", "out_shardings")
_OF_ONE_DEVICE = frozenset({"psum", "psum_invariant", "pmax", "pmin", "pbroadcast", "pvary"})


def without_hints(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same function with every ``bactrian.stage_boundary`` and sharding constraint replaced by its operand, and no
    shardings on inner jitted functions: what one device computes."""
    if not any(_is_hint(equation) or _has_shardings(equation) for equation, _ in equations(jaxpr)):
        return jaxpr

    def rule(equation: Any) -> Any:
        if _is_hint(equation):
            return None
        if not _has_shardings(equation):
            return equation
        open_ = {name: (_unspecified(),) * len(equation.params[name]) for name in _SHARDINGS}
        return equation.replace(params=equation.params | open_)

    return _rewritten(jaxpr, rule)


def without_axis(closed: core.ClosedJaxpr, axis_name: str) -> core.ClosedJaxpr:
    """What a step that is mapped over the axis ``axis_name`` computes on the only device of that axis."""
    effects = frozenset(effect for effect in closed.effects if getattr(effect, "name", None) == axis_name)

    def rule(equation: Any) -> Any:
        axes = _axes(equation)
        if axis_name not in axes:
            return equation.replace(effects=equation.effects - effects)
        if equation.primitive.name in _OF_ONE_DEVICE and axes == (axis_name,):
            return None
        return _on_one_device(equation, axis_name)

    return closed.replace(jaxpr=_rewritten(closed.jaxpr, rule, effects))


def _rewritten(jaxpr: core.Jaxpr, rule: Callable[[Any], Any], effects: frozenset[Any] = frozenset()) -> core.Jaxpr:
    """The same function with each equation replaced by what ``rule`` makes of it, once its inner jaxprs are rewritten:
    another equation, or None where its results are its operands. ``effects`` are gone."""

    def of_value(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=_rewritten(value.jaxpr, rule, effects))
        if isinstance(value, core.Jaxpr):
            return _rewritten(value, rule, effects)
        return tuple(map(of_value, value)) if type(value) is tuple else value

    renamed: dict[Any, Any] = {}

    def now(atom: Any) -> Any:
        return atom if isinstance(atom, core.Literal) else renamed.get(atom, atom)

    kept: list[Any] = []
    for equation in jaxpr.eqns:
        params = {name: of_value(value) for name, value in equation.params.items()}
        new = rule(equation.replace(invars=[now(atom) for atom in equation.invars], params=params))
        if new is None:
            renamed.update(zip(equation.outvars, (now(atom) for atom in equation.invars), strict=True))
        else:
            kept.append(new)
    outvars = [now(atom) for atom in jaxpr.outvars]
    return jaxpr.replace(eqns=kept, outvars=outvars, effects=jaxpr.effects - effects)


def _is_hint(equation: Any) -> bool:
    return is_call(equation, STAGE_BOUNDARY) or equation.primitive.name == "sharding_constraint"


def _has_shardings(equation: Any) -> bool:
    return is_jit(equation) and any(
        sharding is not _unspecified() for name in _SHARDINGS for sharding in equation.params[name]
    )


@functools.cache
def _unspecified() -> Any:
    """What JAX writes where a jitted function was given no sharding."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0).jaxpr.eqns[0].params["in_shardings"][0]


def _axes(equation: Any) -> tuple[Any, ...]:
    """The mapped axes that a collective goes over; none for other equations."""
    if any(isinstance(value, (core.Jaxpr, core.ClosedJaxpr)) for value in equation.params.values()):
        return ()
    axes = equation.params.get("axis_name", equation.params.get("axes", ()))
    return axes if isinstance(axes, tuple) else (axes,)


def _on_one_device(equation: Any, axis_name: str) -> Any:
    """A collective as a call of what JAX makes of it where an axis of one device is a dim of size 1."""
    params = equation.primitive.get_bind_params(equation.params)

    def collective(_: Any, *operands: Any) -> Sequence[Any]:
        results = equation.primitive.bind(*operands, **params)
        return results if equation.primitive.multiple_results else [results]

    def one(*operands: Any) -> list[Any]:
        rows = [jnp.expand_dims(operand, 0) for operand in operands]
        mapped = jax.vmap(collective, axis_name=axis_name)(jnp.zeros(1), *rows)
        return [result[0] for result in mapped]

    (call,) = jax.make_jaxpr(jax.jit(one))(*(atom.aval for atom in equation.invars)).jaxpr.eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info)
