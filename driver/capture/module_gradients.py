"""Gradients of modules, as their libraries take them: ``eqx.filter_value_and_grad`` and ``nnx.value_and_grad``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bactrian.driver.arrays.leaf_types import is_array
from bactrian.driver.capture.updated_in_place import variables


class Differentiated(NamedTuple):
    """What a function returns, its gradients, what these are gradients of, leaf by leaf, and the ``nnx`` variables that it
    has given other values."""

    value: Any
    gradients: Any
    primals: Any
    updated: Sequence[Any] = ()


def value_and_grad_of(
    fun: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, allow_int: bool
) -> Callable[..., Differentiated]:
    """``jax.value_and_grad`` that takes modules too.

    Of an argument that holds an Equinox module, leaves that are no floating-point arrays have no gradient (None). Of one
    that holds an ``nnx`` module, the gradient is the state of its parameters, and what ``fun`` changes in place stays
    changed.
    """
    plain = jax.value_and_grad(fun, argnums=argnums, has_aux=has_aux, allow_int=allow_int)

    def differentiated(*args: Any, **kwargs: Any) -> Differentiated:
        primals = tuple(args[i] for i in argnums) if isinstance(argnums, Sequence) else args[argnums]
        nnx = sys.modules.get("flax.nnx")  # whoever has a module of a library has imported it
        equinox = sys.modules.get("equinox")
        if nnx is not None and _holds(primals, nnx.Module):
            before = {id(each): (each, each.get_raw_value()) for each in variables((args, kwargs))}
            parameters = _parameters(primals, nnx)
            of_modules = nnx.value_and_grad(fun, argnums=argnums, has_aux=has_aux, allow_int=allow_int)
            value, gradients = of_modules(*args, **kwargs)
            updated = [variable for variable, old in before.values() if variable.get_raw_value() is not old]
            return Differentiated(value, gradients, parameters, updated)
        if equinox is not None and _holds(primals, equinox.Module):
            return _of_arrays(fun, argnums, has_aux, args, kwargs)
        return Differentiated(*plain(*args, **kwargs), primals)

    return differentiated


def _holds(tree: Any, kind: type[Any]) -> bool:
    """Whether a node of a pytree is of some type."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in found)


def _parameters(primals: Any, nnx: Any) -> Any:
    """What ``nnx.value_and_grad`` differentiates: of modules, their parameters."""

    def parameters(node: Any) -> Any:
        return nnx.state(node, nnx.Param) if isinstance(node, nnx.Module) else node

    return jax.tree.map(parameters, primals, is_leaf=lambda node: isinstance(node, nnx.Module))


def _of_arrays(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Differentiated:
    """The gradient with respect to the floating-point arrays in some arguments."""
    numbers = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    leaves, tree = jax.tree.flatten(tuple(args[i] for i in numbers))
    inexact = {i: leaf for i, leaf in enumerate(leaves) if _is_inexact(leaf)}

    def of_arrays(arrays: Mapping[int, Any]) -> Any:
        whole = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        given = list(args)
        for number, argument in zip(numbers, whole, strict=True):
            given[number] = argument
        return fun(*given, **kwargs)

    value, arrays = jax.value_and_grad(of_arrays, has_aux=has_aux)(inexact)
    gradients = jax.tree.unflatten(tree, [arrays.get(i) for i in range(len(leaves))])
    gradients = gradients if isinstance(argnums, Sequence) else gradients[0]
    return Differentiated(value, gradients, list(inexact.values()))


def _is_inexact(leaf: Any) -> bool:
    return is_array(leaf) and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
