"""A compiled step: host values and distributed state in, results out."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bactrian.driver.arrays.distributed_array import DistributedArray, of_pieces
from bactrian.driver.arrays.host_values import physical_values, whole_value
from bactrian.driver.arrays.leaf_types import is_array
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.capture.argument_info import ArgumentInfo, ResultInfo
from bactrian.driver.capture.call_signature import aval_key
from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.run.distributed_meshes import meshes_of
from bactrian.driver.run.input_check import refuse_different_inputs
from bactrian.driver.run.session import Session
from bactrian.driver.source import line_here
from bactrian.driver.xla.compile_stage import device_array
from bactrian.passes.frame.errors import ProgramError
from bactrian.passes.frame.phase_times import Timing
from bactrian.passes.frame.units import human_bytes
from bactrian.passes.plan.schema import Plan
from bactrian.runtime import lockstep
from bactrian.runtime.staged_program import ArgumentPiece, ResultPiece

_log = logging.getLogger("bactrian")


class Compiled:
    """A step ready to run. Call it like the step that it was made from."""

    def __init__(self, captured: Captured, session: Session, *, check_inputs: bool = True) -> None:
        """``check_inputs``: as in `parallelize`."""
        self.captured, self.session = captured, session
        self.control = session.world.control
        self._check_inputs = check_inputs and self.control.size > 1
        self._num_calls = 0
        program = session.staged.program
        arguments: dict[int, dict[int, ArgumentPiece | ResultPiece]] = {}  # argument -> stage -> its piece
        for piece in program.arguments:
            arguments.setdefault(piece.argument, {})[program.values[piece.value].stage] = piece
        results: dict[int, dict[int, ArgumentPiece | ResultPiece]] = {}
        for piece in program.results:
            results.setdefault(piece.result, {})[program.values[piece.value].stage] = piece
        self._batch = [info.number for info in captured.arguments if info.role == "batch"]
        self._state = {info.number for info in captured.arguments if info.role == "state"}
        self._held = {
            info.number: self._placement(info, arguments.get(info.number, {}))
            for info in captured.arguments
            if info.role != "batch"
        }
        self._kept = dict[int, ArgumentPlacement]()
        for info in captured.results:
            if info.updates is not None:
                held = self._held[info.updates]
                argument = replace(captured.arguments[info.updates], weak_type=info.weak_type)
                kept = self._placement(argument, results.get(info.number, {}))
                # One object if it is the same, so that the next call sees at a glance that it fits.
                self._kept[info.number] = held if kept == held else kept
        self._home = jax.local_devices()[0]
        self._told_of_moves = False
        # How results are put together: with a placement, a distributed array of the pieces at some positions of what
        # the session gives, by stage; without, a local array.
        at: dict[int, dict[int, int]] = {info.number: {} for info in captured.results}
        for position, (result, stage) in enumerate(session.results):
            at[result][stage] = position
        self._made = [(info, self._kept.get(info.number), tuple(at[info.number].items())) for info in captured.results]
        # What `leaves_if_placed` compares with.
        self._tree, avals, statics = captured.call_signature
        self._quick = not statics
        self._batch_avals = [(number, avals[number]) for number in self._batch]
        self.step_call = captured.collective_call("step")

    @property
    def plan(self) -> Plan:
        """The plan that it was compiled from."""
        return self.session.staged.plan

    @property
    def timing(self) -> Timing:
        """Where the time of making this step went: trace, lower, each pass, compile."""
        return Timing((*self.captured.phases, *self.session.staged.phases, *self.session.phases))

    @property
    def placements(self) -> Sequence[ArgumentPlacement]:
        """Where each argument that is not batch lives, by argument number."""
        return [self._held[number] for number in sorted(self._held)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step.

        Raises:
            ProgramError: the arguments are not those that it was traced with, or a donated one is used again.
        """
        leaves = self.captured.flatten(args, kwargs)
        lockstep.note(self.step_call)
        return self.captured.returned(self.call_leaves(leaves), args, kwargs)

    def leaves_if_placed(self, args: tuple[Any, ...]) -> list[Any] | None:
        """The array leaves of a positional call that goes on where this step placed its state; None for all others.

        Most calls are such ones, and between two steps every loop over the leaves of a state counts.
        """
        if not self._quick:
            return None
        leaves, tree = jax.tree.flatten((args, {}))
        if tree != self._tree:
            return None
        for number, placement in self._held.items():
            leaf = leaves[number]
            if type(leaf) is not DistributedArray or leaf.placement is not placement or leaf.donated_by is not None:
                return None
        for number, aval in self._batch_avals:
            leaf = leaves[number]
            if isinstance(leaf, (DistributedArray, Tracer)) or not is_array(leaf) or aval_key(leaf) != aval:
                return None
        return leaves

    def has_all(self, leaves: Sequence[Any]) -> bool:
        """Whether the distributed ones of a call's array leaves are on all stages that read them."""
        num_stages = self.plan.num_stages
        for number, wanted in self._held.items():
            leaf = leaves[number]
            if isinstance(leaf, DistributedArray):
                here = leaf.placement
                if here is wanted:
                    continue
                if here.num_stages not in (0, num_stages):
                    return False
                if here.stages != wanted.stages and not set(wanted.stages).issubset(here.stages):
                    return False
                if here.num_stages and not here.same_specs(wanted):
                    return False
        return True

    def call_placed(self, leaves: Sequence[Any]) -> Any:
        """One step on what `leaves_if_placed` gave; returns the tree of the result."""
        self._compare_inputs(leaves)
        pieces = [leaves[number].pieces[stage] for number, stage in self.session.arguments]
        if any(map(_is_deleted, pieces)):
            for number in self._held:
                leaves[number].check_usable()
        return self._run(pieces, leaves, [leaves[number] for number in self._held if number in self._state])

    def call_leaves(self, leaves: Sequence[Any]) -> Any:
        """One step on the array leaves of its arguments; returns the tree of the result."""
        self._compare_inputs(leaves)
        pieces: dict[tuple[int, int], jax.Array] = {}
        donated: list[DistributedArray] = []
        moved: dict[str, int] = {}
        for number, placement in self._held.items():
            leaf = leaves[number]
            if isinstance(leaf, DistributedArray):
                if moved_bytes := self._take(leaf, placement, pieces):
                    moved[placement.path] = moved_bytes
                if number in self._state:
                    donated.append(leaf)
            else:
                self._put(leaf, placement, pieces)
        if moved and not self._told_of_moves:
            self._told_of_moves = True
            _log.warning("%s", _moves_text(self.captured.name, moved))
        return self._run([pieces[key] for key in self.session.arguments], leaves, donated)

    def _compare_inputs(self, leaves: Sequence[Any]) -> None:
        """Refuse batches and states that are not the same on all ranks (collective).

        Compared are those of the first call, the second, the 4th, the 8th and so on: ranks may also begin alike, and draw
        a different number of batches later. A state that comes from the host is compared whenever it does.
        """
        self._num_calls += 1
        if not self._check_inputs:
            return
        fresh = {number for number, leaf in enumerate(leaves) if not isinstance(leaf, DistributedArray)}
        if self._num_calls & (self._num_calls - 1) == 0 or self._state & fresh:
            paths = {number: self.captured.arguments[number].path for number in sorted(fresh)}
            values = {path: _addressable(leaves[number], path) for number, path in paths.items()}
            refuse_different_inputs(self.control, values, self.captured.name)

    def _run(self, pieces: Sequence[jax.Array], leaves: Sequence[Any], donated: Sequence[DistributedArray]) -> Any:
        batch = {number: _physical(leaves[number]) for number in self._batch}
        if self.session.mesh_control is not None:
            batch = {number: _addressable(leaf, "a batch argument") for number, leaf in batch.items()}
        if donated and self.session.staged.donate:
            where = line_here() or "an earlier call"
            self._refuse_given_twice(leaves, donated, where)
            for leaf in donated:  # each was checked
                leaf.donated_by, leaf.pieces = where, {}
        return self._wrap(self.session.run(pieces, batch))

    def observe(self, *, trace: bool = False, meter: bool = False) -> None:
        """Record times or held buffers from the next step on (slower); both off goes back to full speed."""
        self.session.observe(trace=trace, meter=meter)

    def write_trace(self, path: str | Path) -> None:
        """Write the recorded steps as one Chrome trace: one row per rank, arrows from send to receive (collective).

        Where it can't be written, that is logged as an error, and training goes on.
        """
        lockstep.note(lockstep.CollectiveCall("call", "write_trace"))
        lockstep.exchange(self.control, None)
        self.session.write_trace(path)

    def _placement(self, info: ArgumentInfo, pieces: Mapping[int, ArgumentPiece | ResultPiece]) -> ArgumentPlacement:
        """Where the pieces of an argument are, given by stage."""
        devices, places, program = self.session.devices, self.session.places, self.session.staged.program
        stages = tuple(sorted(pieces))
        ranks = {stream.rank: stream.stages for stream in self.session.streams}
        alone = self.session.world.num_ranks == 1
        return ArgumentPlacement(
            argument=info.number,
            argnum=info.argnum,
            path=info.path,
            shape=info.shape,
            dtype=info.dtype,
            stages=stages,
            shardings={stage: places.of_value(pieces[stage].value) for stage in stages if stage in devices},
            ranks={
                stage: tuple(rank if not alone else 0 for rank, own in ranks.items() if stage in own)
                for stage in stages
            },
            specs={stage: program.values[pieces[stage].value].spec for stage in stages},
            stage_meshes=meshes_of(program),
            key_impl=info.key_impl,
            num_stages=self.plan.num_stages,
            weak_type=info.weak_type,
            rows={stage: piece.rows for stage, piece in pieces.items() if piece.rows is not None},
        )

    def _take(
        self, leaf: DistributedArray, placement: ArgumentPlacement, pieces: dict[tuple[int, int], jax.Array]
    ) -> int:
        """The pieces of a distributed array; stages that do not hold it get it from one that does (collective).

        Returns:
            How many bytes stages got so.
        """
        leaf.check_usable()
        if leaf.placement is placement or leaf.placement.same_place(placement):
            for stage, piece in leaf.pieces.items():
                pieces[placement.argument, stage] = piece
            return 0
        missing = [
            stage
            for stage in placement.stages
            if stage not in leaf.placement.stages or leaf.placement.rows.get(stage) != placement.rows.get(stage)
        ]
        values = physical_values(leaf) if missing else np.empty(0)
        other = 0  # bytes that come with another sharding
        for stage, sharding in placement.shardings.items():
            if stage in missing:
                piece = device_array(placement.part(stage, values), sharding, True)
            else:
                piece = leaf.pieces[stage]
                if piece.sharding != sharding:
                    other += piece.nbytes
                    piece = jax.device_put(piece, sharding)
                    if not sharding.is_fully_addressable:
                        piece.block_until_ready()  # calls that ranks make together are made one at a time
            pieces[placement.argument, stage] = piece
        return sum(placement.part(stage, values).nbytes for stage in missing) + other

    def _refuse_given_twice(self, leaves: Sequence[Any], donated: Sequence[DistributedArray], where: str) -> None:
        """Refuse a value that one call both consumes and reads elsewhere, while nothing is consumed yet."""
        if len({id(leaves[number]) for number in self._held}) == len(self._held):
            return
        held = [(id(leaves[number]), placement.path) for number, placement in self._held.items()]
        for leaf in donated:
            paths = [path for key, path in held if key == id(leaf)]
            if len(paths) > 1:
                raise ProgramError(
                    f"a donated value is given {len(paths)} times to one step: {', '.join(paths)}",
                    where=where,
                    why="the step consumes its state, so no other argument can be the same array",
                    fix="give a copy (bactrian.gather, then bactrian.put), or parallelize(..., donate=False)",
                )

    def _put(self, leaf: Any, placement: ArgumentPlacement, pieces: dict[tuple[int, int], jax.Array]) -> None:
        """A host value to the stages that read it. Memory that its owner may write to is copied before this returns, and
        state is copied, since the step will consume the copy."""
        if not placement.shardings:
            return
        value = _physical(leaf)
        wanted = self.captured.arguments[placement.argument].physical.dtype
        alias = None if placement.argument not in self._state else False
        for stage, sharding in placement.shardings.items():
            part = placement.part(stage, value)
            if isinstance(part, jax.Array) and sharding.is_fully_addressable:
                # Over several devices, `may_alias=False` is not heard: one of them would get the caller's own buffer.
                own = jnp.copy(part) if alias is False and sharding.num_devices > 1 else part
                piece = jax.device_put(own, sharding, may_alias=alias)
            else:
                piece = device_array(np.asarray(_addressable(part, placement.path), dtype=wanted), sharding, True)
            pieces[placement.argument, stage] = piece

    def _wrap(self, outputs: Sequence[jax.Array]) -> Any:
        """The step's result: state as distributed arrays, everything else as local arrays."""
        leaves: list[Any] = []
        control = self.control
        for info, placement, pieces in self._made:
            if placement is None:
                leaves.append(self._local(outputs[pieces[0][1]], info))
                continue
            if len(pieces) == 1:
                stage, position = pieces[0]
                values = {stage: outputs[position]}
            else:
                values = {stage: outputs[position] for stage, position in pieces} if pieces else {}
            leaves.append(of_pieces(placement, values, control))
        return self.captured.unflatten(leaves)

    def _local(self, value: jax.Array, info: ResultInfo) -> jax.Array:
        if value.sharding.num_devices > 1:
            if value.is_fully_replicated:
                value = value.addressable_data(0)
            elif value.is_fully_addressable:
                value = jax.device_put(value, self._home)
            else:  # every rank of the mesh does the same here
                assert self.session.mesh_control is not None
                value = jax.device_put(whole_value(value, self.session.mesh_control), self._home)
        if self._home not in value.devices():
            value = jax.device_put(value, self._home)
        return value if info.key_impl is None else jax.random.wrap_key_data(value, impl=info.key_impl)


_is_deleted = operator.methodcaller("is_deleted")


def _moves_text(name: str, moved: Mapping[str, int]) -> str:
    """The remark on arguments that are brought to other stages on every call, the largest named."""
    largest = sorted(moved.items(), key=lambda item: -item[1])[:8]
    names = ", ".join(f"{path} ({human_bytes(size)})" for path, size in largest)
    more = f" and {len(moved) - len(largest)} more" if len(moved) > len(largest) else ""
    return (
        f"every call of {name} moves {human_bytes(sum(moved.values()))} of arguments to stages that read them but do "
        f"not hold them so: {names}{more}"
    )


def _addressable(value: Any, path: str) -> Any:
    """Refuse a `jax.Array` that has parts in other processes, and is no result of a step."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable and not value.is_fully_replicated:
        raise ProgramError(
            f"{path} is a jax.Array of which this process holds a part only",
            where=line_here(),
            why="steps take whole arrays, the same on every rank, and what steps have returned",
            fix="give a numpy array, as of jax.experimental.multihost_utils.process_allgather",
        )
    return value


def _physical(leaf: Any) -> Any:
    """A typed key as its words; anything else as it is."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf
