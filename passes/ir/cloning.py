"""Cloning ops into the groups (stages, phases, rounds) that read them, so that a cheap value is never sent or kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import (
    LAYER,
    PARTIAL,
    PHASE,
    UPDATE,
    phase_of,
    required_stage,
    set_stage,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import DATA_MOVEMENT, ELEMENTWISE, NEVER_CLONED
from bactrian.passes.ir.regions import has_product, replace_reads, top_level


def is_elementwise(op: ir.Operation) -> bool:
    """Whether an op costs about what writing its result costs (data movement included)."""
    return op.name in ELEMENTWISE or op.name in DATA_MOVEMENT


def clone_into_readers(
    flow: MainDataflow,
    keys: Sequence[Hashable],
    key_of: Callable[[ir.Operation], Hashable],
    set_key: Callable[[ir.Operation, ir.Operation], None],
    cloneable: Callable[[int, Hashable], bool],
) -> int:
    """Give each group of readers its own copy of every cloneable op that it reads.

    Args:
        flow: the function as it stands; it is out of date afterwards.
        keys: the group of each op; ops without one (None: boundary, return) keep what they read.
        key_of: the group of a clone.
        set_key: ``set_key(clone, reader)`` writes the reader's group on a clone.
        cloneable: ``cloneable(number, reader_key)``: may the op of this number be computed again in that group.

    Returns:
        How many clones were made. An op that nobody reads any more afterwards is erased.
    """
    foreign = _read_elsewhere(flow, keys)
    key_of_result = {flow.values[r.start]: key for r, key in zip(flow.results, keys, strict=True) if r}
    made = 0
    for index in range(len(flow.ops) - 1, -1, -1):
        if not foreign[index]:
            continue
        op, own, block = flow.ops[index], keys[index], flow.ops[index].block
        groups: dict[Hashable, dict[ir.Operation, None]] = {}
        stays = False
        for result in op.results:
            for use in result.uses:
                reader = top_level(use.owner.operation, block)
                key = key_of_result[reader.results[0]] if len(reader.results) else None
                if key is None or key == own:
                    stays = True
                else:
                    groups.setdefault(key, {})[reader] = None
        for key, readers in groups.items():
            if not cloneable(index, key):
                stays = True
                continue
            clone = op.clone(ip=ir.InsertionPoint(op)).operation
            set_key(clone, next(iter(readers)))
            key_of_result[clone.results[0]] = key_of(clone)
            made += 1
            for value in flow.operands[index]:  # which the clone reads in its own group
                producer = flow.producer[value]
                if producer >= 0 and keys[producer] is not None:
                    foreign[producer] = True
            for reader in readers:
                for old, new in zip(op.results, clone.results, strict=True):
                    replace_reads(reader, old, new)
        if groups and not stays:
            op.erase()
            made -= 1
    return made


def _read_elsewhere(flow: MainDataflow, keys: Sequence[Hashable]) -> list[bool]:
    """Which ops a group other than their own reads."""
    foreign = [False] * len(flow.ops)
    for index, key in enumerate(keys):
        if key is None:
            continue
        for value in flow.operands[index]:
            producer = flow.producer[value]
            if producer >= 0 and keys[producer] is not None and keys[producer] != key:
                foreign[producer] = True
    return foreign


def stage_keys(flow: MainDataflow) -> list[Hashable]:
    """The stage of each op, update apart from the rest; None for the boundary and the return."""
    stages = required_stages(flow)
    return [None if s is None else (s, p == UPDATE) for s, p in zip(stages, flow.phases, strict=True)]


def required_stages(flow: MainDataflow) -> list[int | None]:
    """The stage of each op; None for the boundary and the return only.

    Raises:
        PassError: if another op has none.
    """
    none = (flow.boundary, len(flow.ops) - 1)
    for index, stage in enumerate(flow.stages):
        if stage is None and index not in none:
            required_stage(flow.ops[index])
    return [None if index in none else stage for index, stage in enumerate(flow.stages)]


def stage_key(op: ir.Operation) -> Hashable:
    """`stage_keys` for one op that has a stage."""
    update = phase_of(op) == UPDATE
    return required_stage(op), update


def phase_keys(flow: MainDataflow) -> list[Hashable]:
    """The stage and the phase of each op; None for the boundary and the return."""
    return [None if s is None else (s, p) for s, p in zip(required_stages(flow), flow.phases, strict=True)]


def phase_key(op: ir.Operation) -> Hashable:
    """`phase_keys` for one op that has a stage."""
    return required_stage(op), phase_of(op)


def copy_phase(clone: ir.Operation, reader: ir.Operation) -> None:
    """Put a clone into its reader's phase; it stays on its stage."""
    clone.attributes[PHASE] = reader.attributes[PHASE]


def copy_stage(clone: ir.Operation, reader: ir.Operation) -> None:
    """Put a clone on its reader's stage and layer."""
    set_stage(clone, required_stage(reader))
    if LAYER in reader.attributes:
        clone.attributes[LAYER] = reader.attributes[LAYER]


class StageRule:
    """Which ops may be computed again on another stage.

    ``free`` forward and backward ops depend on small arguments and constants only. Elementwise ones may read batch
    arguments too, which every stage can load, where these have no more bytes than the result, which would be sent: masks
    and rotary tables of positions. Not so in a program without products, where elementwise ops are all there is to do.
    ``shared`` values of the update are computed from small arguments, constants and the partial results of regrouped
    folds (``PARTIAL``), which are sent once and end there; large ones only by elementwise ops.
    """

    def __init__(self, flow: MainDataflow, roles: list[str], small_bytes: int) -> None:
        sizes = flow.sizes
        # Of each value the batch arguments that a stage has to load to compute it; None where it can't be computed again.
        loads: list[frozenset[int] | None] = [None] * len(flow.values)
        has_products = any(map(has_product, flow.ops))
        for number in range(flow.num_arguments):
            if roles[number] == "batch" and has_products:
                loads[number] = frozenset([number])
            elif roles[number] != "batch" and sizes[number] <= small_bytes:
                loads[number] = frozenset()
        self._allowed = [False] * len(flow.ops)
        last = len(flow.ops) - 1
        for index, op in enumerate(flow.ops):
            if index in (flow.boundary, last) or op.name in NEVER_CLONED:
                continue
            partial = PARTIAL in op.attributes
            loaded = frozenset[int]() if partial else _union(loads[value] for value in flow.operands[index])
            if loaded is None or (loaded and not is_elementwise(op)):
                continue
            cheap = flow.phases[index] != UPDATE or is_elementwise(op)
            for result in flow.results[index]:
                loads[result] = loaded if cheap or sizes[result] <= small_bytes else None
            made = sum(sizes[result] for result in flow.results[index])
            self._allowed[index] = not partial and sum(sizes[number] for number in loaded) <= made

    def __call__(self, index: int, key: Hashable) -> bool:
        """Whether a reader in group ``key`` may have its own copy."""
        return self._allowed[index]


def _union(sets: Iterable[frozenset[int] | None]) -> frozenset[int] | None:
    """All members; None where a set is."""
    found = frozenset[int]()
    for each in sets:
        if each is None:
            return None
        found |= each
    return found
