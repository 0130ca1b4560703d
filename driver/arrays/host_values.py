"""How arrays on the stages of a step come to the host and go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.arrays.leaf_types import array_positions, is_key, physical
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.source import line_here
from bactrian.driver.xla.compile_stage import device_array
from bactrian.passes.frame.errors import ProgramError
from bactrian.runtime import lockstep
from bactrian.runtime.control import Control
from bactrian.runtime.lockstep import CollectiveCall


class PlacedStep(Protocol):
    """A step as ``put`` needs it."""

    @property
    def placements(self) -> Sequence[ArgumentPlacement] | None:
        """One per captured argument that is not batch, in the order of their numbers; None where none is known yet."""
        ...

    @property
    def control(self) -> Control:
        """The ranks that the step runs on."""
        ...


def gather(tree: Any) -> Any:
    """Host values of a tree that may hold distributed arrays: numpy arrays, and key arrays for typed keys.

    Collective: all ranks call it with the same tree, and all get the values.
    """
    distributed = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, DistributedArray) and _is_elsewhere(leaf)]
    if distributed:
        more = f" and {len(distributed) - 1} more" if len(distributed) > 1 else ""
        lockstep.note(CollectiveCall("call", f"bactrian.gather of {distributed[0].path}{more}"))
        lockstep.exchange(distributed[0].control, None)
    return jax.tree.map(_to_host, tree)


def put(tree: Any, step: PlacedStep, *, argnum: int | None = None) -> Any:
    """Host values to where a step keeps them; the inverse of ``gather``.

    Args:
        tree: the whole argument of the step, every rank with the same values.
        step: the step, or the result of ``compile()``. One that was not called yet keeps nothing anywhere: the tree comes
            back as it is, and the first call takes it.
        argnum: which positional argument it is; found by its shapes and dtypes when not given.

    Raises:
        ProgramError: the tree fits no argument of the step, or several.
    """
    known = step.placements
    if known is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    positions = array_positions(leaves, treedef)
    placements = _placements_of([leaves[i] for i in positions], known, argnum)
    for i, placement in zip(positions, placements, strict=True):
        if not isinstance(leaves[i], DistributedArray):
            leaves[i] = _to_devices(leaves[i], placement, step.control)
    return jax.tree.unflatten(treedef, leaves)


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, DistributedArray):
        leaf.check_usable()
        data = physical_values(leaf)
        if leaf.placement.key_impl is None:
            return data
        return jax.random.wrap_key_data(jnp.asarray(data), impl=leaf.placement.key_impl)
    if isinstance(leaf, jax.Array) and not is_key(leaf.dtype):
        return np.asarray(leaf)
    return leaf


def _is_elsewhere(array: DistributedArray) -> bool:
    """Whether ranks have to send each other some of it."""
    return not all(_is_here(array, stage) for stage in array.placement.sources)


def _is_here(array: DistributedArray, stage: int) -> bool:
    """Whether every rank holds all of one stage's piece."""
    if array.control.size == 1:
        return True
    ranks, piece = array.placement.ranks.get(stage, (0,)), array.pieces.get(stage)
    return len(ranks) == array.control.size and piece is not None and piece.is_fully_replicated


def physical_values(array: DistributedArray) -> np.ndarray[Any, Any]:
    """The values of the whole array, on every rank: the first stage's copy, or the rows of several stages."""
    placement = array.placement
    return placement.whole((stage, _stage_values(array, stage)) for stage in placement.sources)


def _stage_values(array: DistributedArray, stage: int) -> np.ndarray[Any, Any]:
    """The values of one stage's piece, on every rank. Collective."""
    control = array.control
    ranks = array.placement.ranks.get(stage, (0,))
    piece = array.pieces.get(stage)
    if _is_here(array, stage):
        assert piece is not None
        return np.asarray(piece)
    whole = physical(array.placement.shape, array.placement.dtype)
    start, stop = array.placement.rows.get(stage, (0, 0))
    shape = (stop - start, *whole.shape[1:]) if stage in array.placement.rows else whole.shape
    values = np.empty(shape, whole.dtype)
    if len(ranks) == 1:
        if control.rank == ranks[0]:
            assert piece is not None
            values = np.array(piece, order="C")
        control.broadcast_array(values, ranks[0])
        return values
    return _gathered(values, piece, control)


def whole_value(array: jax.Array, control: Control) -> np.ndarray[Any, Any]:
    """The values of an array on a mesh of several ranks, on each of them. Collective."""
    return _gathered(np.empty(array.shape, array.dtype), array, control)


def _gathered(values: np.ndarray[Any, Any], piece: jax.Array | None, control: Control) -> np.ndarray[Any, Any]:
    """Fill ``values`` with what the mesh's ranks hold: each sends the shards that it is the first to hold."""
    held = piece.addressable_shards if piece is not None else []
    own = [shard for shard in held if shard.replica_id == 0]
    for rank, boxes in enumerate(control.allgather([shard.index for shard in own])):
        for number, box in enumerate(boxes):
            # Not pickled: a shard may have more bytes than one message of MPI.
            mine = rank == control.rank
            data = np.array(own[number].data, order="C") if mine else np.empty(values[box].shape, values.dtype)
            control.broadcast_array(data, rank)
            values[box] = data
    return values


def _placements_of(
    leaves: Sequence[Any], known: Sequence[ArgumentPlacement], argnum: int | None
) -> list[ArgumentPlacement]:
    by_argnum: dict[int | None, list[ArgumentPlacement]] = {}
    for placement in sorted(known, key=lambda p: p.argument):
        by_argnum.setdefault(placement.argnum, []).append(placement)
    wanted = [_shape_dtype(leaf) for leaf in leaves]
    fits = [n for n, ps in by_argnum.items() if [(p.shape, p.dtype) for p in ps] == wanted and argnum in (None, n)]
    if len(fits) != 1:
        raise ProgramError(
            f"the tree of {len(leaves)} arrays fits {len(fits)} arguments of the step",
            where=line_here(),
            why="; ".join(f"argument {n} has {len(ps)} arrays, first {ps[0].path}" for n, ps in by_argnum.items()),
            fix="give the whole argument" + ("" if argnum is not None else ", and argnum= if several look alike"),
        )
    return by_argnum[fits[0]]


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    value = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    dtype = value.dtype if is_key(value.dtype) else jax.dtypes.canonicalize_dtype(value.dtype)
    return tuple(value.shape), dtype


def _to_devices(leaf: Any, placement: ArgumentPlacement, control: Control) -> DistributedArray:
    value = np.asarray(jax.random.key_data(leaf)) if is_key(getattr(leaf, "dtype", None)) else np.asarray(leaf)
    value = value.astype(physical(placement.shape, placement.dtype).dtype, copy=False)
    pieces = {
        stage: device_array(placement.part(stage, value), sharding, True)
        for stage, sharding in placement.shardings.items()
    }
    return DistributedArray(placement, pieces, control)
