"""Cloning ops into the groups (stages, phases, rounds) that read them, so that a cheap value is never sent or kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from jaxlib.mlir import ir

from bactrian.passes.program import (
    BOUNDARY,
    UPDATE,
    Dataflow,
    argument_roles,
    body,
    custom_call_target,
    replace_reads,
    required_integer,
    string_attribute,
    top_level,
    value_bytes,
)

PARTIAL = "bactrian.partial"  # an op that ends one stage's part of a regrouped fold

# Ops that cost about what writing their result costs.
_ELEMENTWISE_NAMES = """
abs add and atan2 bitcast_convert broadcast broadcast_in_dim cbrt ceil clamp compare complex concatenate constant
convert cosine count_leading_zeros divide exponential exponential_minus_one floor imag iota is_finite log log_plus_one
logistic maximum minimum multiply negate not or pad popcnt power real remainder reshape reverse round_nearest_afz
round_nearest_even rsqrt select shift_left shift_right_arithmetic shift_right_logical sign sine slice sqrt subtract tan
tanh transpose xor
"""
_ELEMENTWISE = frozenset(f"stablehlo.{name}" for name in _ELEMENTWISE_NAMES.split())

NEVER_CLONED = frozenset(
    f"stablehlo.{name}" for name in ("dot_general", "dot", "convolution", "fft", "cholesky", "triangular_solve", "sort")
)


def is_elementwise(op: ir.Operation) -> bool:
    """Whether an op costs about what writing its result costs (data movement included)."""
    return op.name in _ELEMENTWISE


def clone_into_readers(
    main: ir.Operation,
    key_of: Callable[[ir.Operation], Hashable],
    set_key: Callable[[ir.Operation, ir.Operation], None],
    cloneable: Callable[[ir.Operation, Hashable], bool],
) -> int:
    """Give each group of readers its own copy of every cloneable op that it reads.

    Args:
        main: the function; ops without a key (``key_of`` gives None: boundary, return) keep what they read.
        key_of: the group of an op.
        set_key: ``set_key(clone, reader)`` writes the reader's group on a clone.
        cloneable: ``cloneable(op, reader_key)``: may this op be computed again in that group.

    Returns:
        How many clones were made. An op that nobody reads any more afterwards is erased.
    """
    block = body(main)
    made = 0
    for op in reversed([view.operation for view in block.operations]):
        own = key_of(op)
        if own is None or len(op.results) == 0:
            continue
        groups: dict[Hashable, dict[ir.Operation, None]] = {}
        stays = False
        for result in op.results:
            for use in result.uses:
                reader = top_level(use.owner.operation, block)
                key = key_of(reader)
                if key is None or key == own:
                    stays = True
                else:
                    groups.setdefault(key, {})[reader] = None
        for key, readers in groups.items():
            if not cloneable(op, key):
                stays = True
                continue
            clone = op.clone(ip=ir.InsertionPoint(op)).operation
            set_key(clone, next(iter(readers)))
            made += 1
            for reader in readers:
                for old, new in zip(op.results, clone.results, strict=True):
                    replace_reads(reader, old, new)
        if groups and not stays:
            op.erase()
            made -= 1
    return made


def is_boundary_or_return(op: ir.Operation) -> bool:
    """Whether an op belongs to no group: the gradient boundary and the function's return."""
    return op.name in ("func.return", "return") or custom_call_target(op) == BOUNDARY


def stage_key(op: ir.Operation) -> Hashable:
    """The stage of an op, update apart from the rest; None for the boundary and the return."""
    if is_boundary_or_return(op):
        return None
    update = string_attribute(op, "bactrian.phase") == UPDATE
    return required_integer(op, "bactrian.stage", "assign-stages"), update


def copy_stage(clone: ir.Operation, reader: ir.Operation) -> None:
    """Put a clone on its reader's stage and layer."""
    for name in ("bactrian.stage", "bactrian.layer"):
        if name in reader.attributes:
            clone.attributes[name] = reader.attributes[name]


class StageRule:
    """Which ops may be computed again on another stage.

    ``free`` forward and backward ops depend on small arguments and constants only. ``shared`` values of the update are
    computed from small arguments, constants and the partial results of regrouped folds (``PARTIAL``), which are sent
    once and end there; large ones only by elementwise ops.
    """

    def __init__(self, main: ir.Operation, small_bytes: int) -> None:
        flow = Dataflow.of(main)
        roles = argument_roles(main)
        sizes = [value_bytes(value) for value in flow.values]
        known = [roles[i] != "batch" and sizes[i] <= small_bytes for i in range(flow.num_arguments)]
        known += [False] * (len(flow.values) - flow.num_arguments)
        self._allowed: set[ir.Operation] = set()
        for index, op in enumerate(flow.ops):
            if is_boundary_or_return(op) or op.name in NEVER_CLONED:
                continue
            partial = PARTIAL in op.attributes
            again = not partial and all(known[value] for value in flow.operands[index])
            update = string_attribute(op, "bactrian.phase") == UPDATE
            cheap = not update or is_elementwise(op)
            for result in flow.results[index]:
                known[result] = (again or partial) and (cheap or sizes[result] <= small_bytes)
            if again:
                self._allowed.add(op)

    def __call__(self, op: ir.Operation, key: Hashable) -> bool:
        """Whether a reader in group ``key`` may have its own copy."""
        return op in self._allowed
