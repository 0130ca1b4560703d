"""When are two results equal, which combinations are tested, and a serial oracle for the bits."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bactrian.runtime.staged_program import Call, StagedProgram

TOLERANCE = 1e-5
TREE_FLOOR = 1e-3

Row = dict[str, Any]
PLAN = ("stages", "schedule")  # names in a row that one device knows nothing of


def host(tree: Any) -> Any:
    """The tree with every array as a numpy array; keys as their data, other leaves as they are."""

    def leaf(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x) if isinstance(x, jax.Array | np.ndarray | np.generic | int | float | bool) else x

    return jax.tree.map(leaf, tree)


def assert_equal_step(ours: Any, reference: Any, zero_gradient_leaves: Sequence[str] = ()) -> float:
    """Assert that two results of one step are equal, and return the largest relative error.

    Each element of a result tuple is a tree of its own. A floating scalar (a loss, a metric) must agree within 1e-5
    relative; any other floating leaf within ``1e-5 * max(|leaf|, 1e-3 * |tree|)`` in the 2-norm; everything else
    exactly. NaN and infinities must stand at the same places. The error returned is ``|ours - reference|`` over that
    maximum, so 1e-5 is where it fails.

    Args:
        ours: gathered result.
        reference: the oracle's result, same tree.
        zero_gradient_leaves: parts of key paths, e.g. ``"key/bias"``, of leaves whose exact gradient is zero: rounding
            noise only, so they are not compared.
    """
    ours, reference = host(ours), host(reference)
    assert jax.tree.structure(ours) == jax.tree.structure(reference), "the results are different trees"
    elements = list(zip(ours, reference, strict=True)) if isinstance(reference, tuple) else [(ours, reference)]
    worst, problems = 0.0, list[str]()
    for number, (mine, theirs) in enumerate(elements):
        leaves = jax.tree_util.tree_leaves_with_path(theirs)
        tree_norm = _norm([x for _, x in leaves if _is_float(x)])
        for (path, want), got in zip(leaves, jax.tree.leaves(mine), strict=True):
            name = f"result[{number}]/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            if any(part in name for part in zero_gradient_leaves):
                continue
            error = _leaf_error(got, want, tree_norm)
            worst = max(worst, error)
            if not error <= TOLERANCE:
                problems.append(f"{name}: relative error {error:.2e}, {_describe(got)} instead of {_describe(want)}")
    assert not problems, "\n".join(problems[:20])
    return worst


def _leaf_error(got: Any, want: Any, tree_norm: float) -> float:
    if not isinstance(want, np.ndarray):
        return 0.0 if got is want or got == want else np.inf
    if got.shape != want.shape or got.dtype != want.dtype:
        return np.inf
    if not _is_float(want):
        return 0.0 if np.array_equal(got, want) else np.inf
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return np.inf
    got, want = got[finite].astype(np.float64), want[finite].astype(np.float64)
    difference = float(np.linalg.norm(got - want))
    return difference / max(_norm([want]), TREE_FLOOR * tree_norm) if difference else 0.0


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def _norm(leaves: Sequence[np.ndarray]) -> float:
    squares = (np.square(np.where(np.isfinite(x), x, 0.0).astype(np.float64)).sum() for x in leaves)
    return float(np.sqrt(sum(squares)))


def _describe(x: Any) -> str:
    if not isinstance(x, np.ndarray):
        return repr(x)
    return f"{x.dtype}{list(x.shape)}" + (f" {x.item()}" if x.size == 1 else f" of norm {_norm([x]):.3g}")


def digest(tree: Any) -> str:
    """A fingerprint of the bits of all leaves."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(host(tree)):
        array = np.asarray(leaf) if not callable(leaf) else np.zeros(0)
        sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return sha.hexdigest()[:16]


def pairwise_cover(
    factors: Mapping[str, Sequence[Any]], feasible: Callable[[Row], bool] = lambda _: True
) -> tuple[Row, ...]:
    """A small list of rows in which each feasible pair of values of two factors occurs; greedy and deterministic.

    Among equal choices the first value wins: put the ones first that are quick to run.

    ``feasible`` also sees unfinished rows, and says no as soon as the values chosen so far exclude each other.
    """
    names = list(factors)
    pairs = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if feasible({a: x, b: y})
    ]
    missing = dict.fromkeys(pairs)

    def gain(row: Row, name: str, value: Any) -> int:
        index = names.index(name)
        return sum(
            (
                ((other, row[other]), (name, value))
                if names.index(other) < index
                else ((name, value), (other, row[other]))
            )
            in missing
            for other in row
        )

    rows = list[Row]()
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                values = [value for value in factors[name] if feasible({**row, name: value})]
                row[name] = max(values, key=lambda value: gain(row, name, value))
        for (a, x), (b, y) in itertools.combinations(((name, row[name]) for name in names), 2):
            missing.pop(((a, x), (b, y)), None)
        rows.append({name: row[name] for name in names})
    return tuple(rows)


def product(factors: Mapping[str, Sequence[Any]], feasible: Callable[[Row], bool] = lambda _: True) -> tuple[Row, ...]:
    """Every feasible row."""
    rows = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return tuple(row for row in rows if feasible(row))


def run_serially(
    program: StagedProgram, functions: Mapping[str, Callable[..., Sequence[Any]]], arguments: Sequence[np.ndarray]
) -> dict[int, np.ndarray]:
    """Run the stage functions one after another, microbatch by microbatch: the oracle of the bits.

    Args:
        program: the staged program.
        functions: stage function by symbol, from arrays to a sequence of arrays.
        arguments: the captured arguments, whole batches included.

    Returns:
        The captured results by number (of a result with several pieces, the last).
    """
    static, batch = dict[int, Any](), dict[int, Any]()
    for piece in program.arguments:
        (batch if piece.role == "batch" else static)[piece.value] = arguments[piece.argument]
    arrive = {transfer.target: transfer.source for transfer in program.transfers}
    values, carried = dict[int, Any](), dict[tuple[str, int], Any]()

    def read(value: int) -> Any:
        return values[value] if value in values else read(arrive[value])

    def run(call: Call, microbatch: int) -> None:
        inputs = [
            np.int32(microbatch) if position == call.index_input else None for position in range(len(call.inputs))
        ]
        for position, value in enumerate(call.inputs):
            if position != call.index_input:
                inputs[position] = carried.get((call.function, position)) if microbatch else None
                inputs[position] = read(value) if inputs[position] is None else inputs[position]
        outputs = [np.array(x) for x in functions[call.function](*inputs)]
        values.update(zip(call.outputs, outputs, strict=True))
        carried.update({(call.function, into): outputs[out] for into, out in call.carries})

    values.update(static)
    for call in program.calls:
        if call.phase in ("prepare", "initialize"):
            run(call, 0)
    for microbatch in range(program.num_microbatches):
        for value, whole in batch.items():
            values[value] = np.split(whole, program.num_microbatches)[microbatch]
        for call in program.calls:
            if call.phase in ("forward", "backward", "forward_backward"):
                run(call, microbatch)
    for call in program.calls:
        if call.phase == "update":
            run(call, 0)
    return {piece.result: np.asarray(read(piece.value)) for piece in program.results}
