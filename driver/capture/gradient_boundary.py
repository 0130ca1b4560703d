"""The gradient boundary: what a train step says to be run as a pipeline.

Outside a capture every function here is JAX's own. While ``driver.capture`` traces a step, results go through one
custom call that says which values are loss, aux and gradients, and how each is reduced over the microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bactrian.driver.arrays.leaf_types import array_positions, is_array
from bactrian.driver.capture.module_gradients import Differentiated, value_and_grad_of
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.ir.attributes import GRADIENT_BOUNDARY, MICROBATCH_INDEX, STAGE_BOUNDARY

DIFFERENTIATED = "bactrian.differentiated"
"""Custom call that reads what a gradient is taken of and is no leaf of an argument; capture takes it out again."""
GRADIENT_REDUCTIONS = ("mean", "sum")
REDUCTIONS = ("mean", "sum", "last", "concat")


@dataclass(eq=False)
class CaptureMode:
    """One capture under way.

    Attributes:
        index: the traced number of the microbatch.
        arguments: the traced array leaves of the step's arguments by their `id`, each with whether it belongs to the
            batch.
    """

    num_microbatches: int
    forward_only: bool = False
    index: jax.Array | None = None
    index_used: bool = field(default=False, init=False)
    arguments: dict[int, tuple[Any, bool]] = field(default_factory=dict[int, tuple[Any, bool]], init=False)

    def is_batch(self, leaf: Any) -> bool | None:
        """Whether an array leaf of the step's arguments belongs to the batch; None for anything else."""
        return self.arguments.get(id(leaf), (leaf, None))[1]

    @property
    def rows(self) -> set[int]:
        """Dim 0 of the leaves of the batch, which are those of a microbatch."""
        return {argument.shape[0] for argument, is_batch in self.arguments.values() if is_batch}


# Part of JAX's tracing cache key: a function jitted inside the step is traced anew for each capture, and a trace made
# in a capture is never used outside of it.
_active = jax.make_user_context(default_value=None)


@contextmanager
def capturing(num_microbatches: int, forward_only: bool = False) -> Generator[CaptureMode]:
    """Makes the functions of this module mark the program that is being traced."""
    mode = CaptureMode(num_microbatches, forward_only)
    with _active(mode):
        try:
            yield mode
        finally:
            mode.index, mode.arguments = None, {}  # no tracer outlives its trace


def trace_index(mode: CaptureMode) -> None:
    """Puts the one ``bactrian.microbatch_index`` of a captured program where every nested function can read it."""
    mode.index = jax.ffi.ffi_call(MICROBATCH_INDEX, jax.ShapeDtypeStruct((), jnp.int32))()


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduction: str = "mean",
    aux_reduction: Any = None,
    **options: Any,
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad``, whose results are reduced over the microbatches of a parallelized step.

    The gradient of a leaf of the batch has a row for each row of the batch: those of the microbatches one after another.
    Modules of Equinox and ``nnx`` are differentiated as by ``eqx.filter_value_and_grad`` and ``nnx.value_and_grad``.

    Args:
        fun: a scalar function, as for JAX.
        argnums: which arguments to differentiate.
        has_aux: whether ``fun`` returns ``(loss, aux)``.
        holomorphic: refused; the boundary is defined for real losses.
        allow_int: forwarded to JAX.
        reduction: ``mean`` or ``sum`` over microbatches, of the loss and the gradients alike. A mean of masked means
            over unequal masks is a mean of means.
        aux_reduction: one word or a prefix tree of ``mean``, ``sum``, ``last``, ``concat`` (along dim 0, in the order
            of the microbatches). ``mean`` by default, but with several microbatches leaves that are not floating point
            need one of the last three, and those with as many rows as a microbatch any of the four.
        options: JAX's other options, refused by name.

    Raises:
        ConfigError: an unknown reduction or option.
        ProgramError: an aux leaf that can't be reduced as asked.
    """
    _refuse_options(holomorphic, options)
    if reduction not in GRADIENT_REDUCTIONS:
        raise ConfigError(
            f"unknown reduction {reduction!r} of loss and gradients",
            where=line_here(),
            fix=f"use one of {', '.join(GRADIENT_REDUCTIONS)}",
        )
    if aux_reduction is not None:
        _check_words(aux_reduction)
    differentiated = value_and_grad_of(fun, argnums, has_aux, allow_int)

    @functools.wraps(fun)
    def value_and_grad_fun(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        found = differentiated(*args, **kwargs)
        mode: CaptureMode | None = _active.value
        if mode is None:
            return found.value, found.gradients
        loss, aux = found.value if has_aux else (found.value, None)
        loss, aux, gradients = _mark_gradients(mode, loss, aux, found, reduction, aux_reduction)
        return ((loss, aux) if has_aux else loss), gradients

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduction: str = "mean",
    aux_reduction: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """``jax.grad``, whose results are reduced over the microbatches; see ``value_and_grad``."""
    both = value_and_grad(
        fun, argnums, has_aux, holomorphic, allow_int, reduction=reduction, aux_reduction=aux_reduction, **options
    )

    @functools.wraps(fun)
    def grad_fun(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return grad_fun


def microbatch_index() -> Any:
    """The number of the microbatch under way, to fold into a random key; 0 outside a parallelized step."""
    mode: CaptureMode | None = _active.value
    if mode is None:
        return np.int32(0)
    mode.index_used = True
    return mode.index


def stage_boundary(x: Any) -> Any:
    """The identity on a pytree; in a parallelized step, a request that a layer begin after it."""
    if _active.value is None:
        return x
    return jax.tree.map(lambda leaf: _stage_boundary(leaf) if _is_inexact(leaf) else leaf, x)


def _stage_boundary_call(x: Any) -> Any:
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call(STAGE_BOUNDARY, result, vmap_method="broadcast_all")(x)


# The identity's derivative is the identity: only the forward pass is marked.
_stage_boundary = jax.custom_jvp(_stage_boundary_call)
_stage_boundary.defjvps(lambda tangent, _result, _x: tangent)


def mark(mode: CaptureMode, leaves: Sequence[Any], kinds: Sequence[str], reductions: Sequence[str]) -> list[Any]:
    """Passes array leaves through one boundary; typed keys travel as their bits."""
    operands = [jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf) for leaf in leaves]
    results = [
        jax.ShapeDtypeStruct(_reduced_shape(x.shape, reduction, mode.num_microbatches), x.dtype)
        for x, reduction in zip(operands, reductions, strict=True)
    ]
    # Under vmap, "sequential" puts the call into a loop, where capture finds it and can name its line.
    call = jax.ffi.ffi_call(GRADIENT_BOUNDARY, results, vmap_method="sequential")
    marked = call(*operands, kinds=",".join(kinds), reductions=",".join(reductions))
    return [
        jax.random.wrap_key_data(y, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else y
        for leaf, y in zip(leaves, marked, strict=True)
    ]


def tree_reductions(tree: Any, words: Any, option: str) -> list[str]:
    """One reduction per array leaf of ``tree``, from one word or a prefix tree of words.

    Raises:
        ConfigError: an unknown word.
        ProgramError: the words do not fit the tree, or a leaf can't be reduced that way.
    """
    _check_words(words)
    try:
        spread = jax.tree.map(lambda word, part: jax.tree.map(lambda _: word, part), words, tree)
    except ValueError as error:
        raise ProgramError(
            f"{option} is no prefix of the tree of values",
            where=line_here(),
            why=str(error),
            fix="give one word, or a tree of words that ends where the tree of values does or earlier",
        ) from None
    by_path = list(zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(spread), strict=True))
    reductions: list[str] = []
    for i in array_positions([leaf for (_, leaf), _ in by_path], jax.tree.structure(tree)):
        (path, leaf), word = by_path[i]
        _check_reducible(jax.tree_util.keystr(path), leaf, word, option)
        reductions.append(word)
    return reductions


def _mark_gradients(
    mode: CaptureMode, loss: Any, aux: Any, found: Differentiated, reduction: str, aux_reduction: Any
) -> tuple[Any, Any, Any]:
    """Passes what a gradient gives through the boundary; variables that were updated get their new values there."""
    if mode.forward_only:
        raise ProgramError(
            "a forward-only function takes a gradient",
            where=line_here(),
            fix="drop forward_only=True, or return the loss without bactrian.value_and_grad",
        )
    if aux_reduction is None and mode.num_microbatches > 1:
        _refuse_rows(mode, aux)
    # Of one microbatch everything is as it is, integers too.
    default = "mean" if mode.num_microbatches > 1 else "last"
    aux_reductions = tree_reductions(aux, aux_reduction or default, "aux_reduction")
    updated = [variable.get_raw_value() for variable in found.updated]
    aux_reductions += ["mean" if _is_inexact(leaf) else "last" for leaf in jax.tree.leaves(updated)]
    of_batch = _of_batch(mode, found.gradients, found.primals)
    leaves, tree = jax.tree.flatten((loss, aux, updated, found.gradients))
    positions = array_positions(leaves, tree)
    kinds = ["loss", *["aux"] * len(aux_reductions), *["gradient"] * len(of_batch)]
    words = [reduction, *aux_reductions, *("concat" if each else reduction for each in of_batch)]
    rows = [False] * (1 + len(aux_reductions)) + of_batch
    marked = mark(mode, [leaves[i] for i in positions], kinds, words)
    for i, value, is_rows in zip(positions, marked, rows, strict=True):
        # A microbatch's mean loss is num_microbatches times as sensitive to one of its rows as the mean of all is.
        leaves[i] = value / mode.num_microbatches if is_rows and reduction == "mean" else value
    loss, aux, updated, gradients = jax.tree.unflatten(tree, leaves)
    for variable, value in zip(found.updated, updated, strict=True):
        variable.set_raw_value(value)
    return loss, aux, gradients


def _of_batch(mode: CaptureMode, gradients: Any, primals: Any) -> list[bool]:
    """For each array leaf of the gradients, whether it is that of a leaf of the batch.

    What is no leaf of an argument goes into a call that capture looks at: it knows what such values are computed from.
    """
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(primals), strict=True)
    found = [(mode.is_batch(primal), primal) for gradient, primal in pairs if is_array(gradient)]
    others = [jnp.asarray(primal) for is_batch, primal in found if is_batch is None]
    if others and mode.num_microbatches > 1:
        jax.ffi.ffi_call(DIFFERENTIATED, jax.ShapeDtypeStruct((), jnp.int32))(*others)
    return [bool(is_batch) for is_batch, _ in found]


def _refuse_rows(mode: CaptureMode, aux: Any) -> None:
    """Refuse to take the mean over microbatches, unless it is asked for, of what may have a row for each example."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if is_array(leaf) and _is_inexact(leaf) and leaf.shape[:1] and leaf.shape[0] in mode.rows:
            name = jax.tree_util.keystr(path) or "the aux value"
            raise ProgramError(
                f"{name} may have a row for each example: it is {leaf.dtype}[{','.join(map(str, leaf.shape))}], and a "
                f"microbatch has {leaf.shape[0]} rows",
                where=line_here(),
                why="aux_reduction is not given, and the mean over microbatches would mix the rows of different examples",
                fix="compute metrics of it in the loss function and return these as aux, of which the mean is taken; or say "
                "aux_reduction='concat' to put rows together, 'mean' if they are not those of examples",
            )


def _refuse_options(holomorphic: bool, options: dict[str, Any]) -> None:
    if holomorphic:
        raise ConfigError(
            "holomorphic=True is not supported",
            where=line_here(),
            why="loss and gradients are averaged over microbatches as real numbers",
            fix="use jax.grad(holomorphic=True) inside the loss function",
        )
    for name, value in options.items():
        if name == "reduce_axes" and not value:
            continue
        raise ConfigError(f"option {name!r} of JAX's grad is not supported", where=line_here(), fix=f"drop {name!r}")


def _check_words(words: Any) -> None:
    for word in jax.tree.leaves(words):
        if word not in REDUCTIONS:
            raise ConfigError(
                f"unknown reduction {word!r}", where=line_here(), fix=f"use one of {', '.join(REDUCTIONS)}"
            )


def _check_reducible(path: str, leaf: Any, word: str, option: str) -> None:
    value = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    name, what = path or "the value", f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if word == "concat" and not value.shape:
        raise ProgramError(
            f"cannot concatenate {name}: it is a scalar ({what})",
            where=line_here(),
            fix=f"give it {option}='mean', 'sum' or 'last', or a leading dim of 1",
        )
    if word == "mean" and not _is_inexact(value):
        raise ProgramError(
            f"cannot take the mean of {name} over microbatches: it is {what}",
            where=line_here(),
            why=f"{option} is 'mean' for it, and only floating-point values have a mean of their own dtype",
            fix=f"give it {option}='sum', 'last' or 'concat', or convert it to a float",
        )
    if word == "sum" and (_is_key(value) or value.dtype == jnp.bool_):
        raise ProgramError(
            f"cannot sum {name} over microbatches: it is {what}",
            where=line_here(),
            fix=f"give it {option}='last' or 'concat'" + ("" if _is_key(value) else ", or convert it to an integer"),
        )


def _reduced_shape(shape: tuple[int, ...], reduction: str, num_microbatches: int) -> tuple[int, ...]:
    return (shape[0] * num_microbatches, *shape[1:]) if reduction == "concat" else shape


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
