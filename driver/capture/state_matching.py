"""Which result is the next value of which argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ProgramError


@dataclass(frozen=True, eq=False)
class StepPart:
    """One argument of a step, or one element of its result.

    ``name`` is the path of its root; ``leaves`` are its array leaves (each with number, path, shape and dtype).
    ``pythonic`` is true for an argument made of Python numbers only, which is never state.
    """

    name: str
    index: int
    tree: Any
    leaves: tuple[Any, ...]
    signature: tuple[Any, ...]
    pythonic: bool = False

    @classmethod
    def of(cls, name: str, index: int, tree: Any, leaves: Sequence[Any], statics: Mapping[int, Any]) -> StepPart:
        """``statics`` are its leaves that are no arrays, by position."""
        avals = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        static = tuple(sorted(statics.items(), key=lambda item: item[0]))
        return cls(name, index, tree, tuple(leaves), (tree, avals, static))

    @property
    def statics(self) -> tuple[tuple[int, Any], ...]:
        """Its leaves that are no arrays, with their positions."""
        return self.signature[2]

    @property
    def bare(self) -> bool:
        """Whether it is a single array rather than a tree."""
        return self.tree.node_data() is None and bool(self.leaves)

    def reads(self, argument: StepPart, dependencies: Sequence[int]) -> bool:
        """Whether this result element is computed from ``argument``, or is without arrays as it is."""
        inputs = sum(1 << leaf.number for leaf in argument.leaves)
        return not argument.leaves or any(dependencies[leaf.number] & inputs for leaf in self.leaves)


def match_state(
    arguments: Mapping[int, StepPart],
    elements: Sequence[StepPart],
    losses: set[int],
    dependencies: Sequence[int],
    given: Mapping[int, int | None] | None,
) -> dict[int, int]:
    """Pairs arguments with the result elements that are their next values.

    A next value has its argument's tree, shapes, dtypes and static leaves, and is computed from it. Arguments and
    elements that look alike are paired in order when there are equally many.

    Args:
        arguments: the arguments that may be state, by number.
        elements: the elements of the result.
        losses: numbers of results that are a boundary's loss, never a next value.
        dependencies: for each result, the bit set of the arguments' leaves that it is computed from.
        given: what the user said: result index by argument number, ``None`` for read only.

    Raises:
        ProgramError: ambiguous, or an argument's next value has another structure, shape or dtype.
    """
    given = given or {}
    pairs = {argnum: _given_element(argnum, index, arguments, elements) for argnum, index in given.items()}
    pairs = {argnum: index for argnum, index in pairs.items() if index is not None}
    if len(set(pairs.values())) < len(pairs):
        raise ProgramError(f"state={dict(given)} gives one result to two arguments", where=line_here())
    open_args = [
        argnum for argnum, part in arguments.items() if argnum not in given and part.leaves and not part.pythonic
    ]
    taken = set(pairs.values())
    open_elements = [
        element
        for element in elements
        if element.index not in taken and not (element.bare and element.leaves[0].number in losses)
    ]
    for argnum in open_args:
        if argnum in pairs:
            continue
        alike = [a for a in open_args if arguments[a].signature == arguments[argnum].signature]
        nexts = [
            e
            for e in open_elements
            if e.signature == arguments[argnum].signature and any(e.reads(arguments[a], dependencies) for a in alike)
        ]
        alike = [a for a in alike if any(e.reads(arguments[a], dependencies) for e in nexts)]
        if not nexts or argnum not in alike:
            continue
        if len(alike) != len(nexts):
            _refuse_ambiguous(alike, nexts, arguments)
        pairs.update(zip(alike, (e.index for e in nexts), strict=True))
    left = [e for e in open_elements if e.index not in pairs.values()]
    for argnum in open_args:
        if argnum not in pairs:
            _refuse_changed(arguments[argnum], left, dependencies)
    return pairs


def _given_element(
    argnum: int, index: int | None, arguments: Mapping[int, StepPart], elements: Sequence[StepPart]
) -> int | None:
    if argnum not in arguments:
        raise ProgramError(
            f"state= names argument {argnum}, which is no positional argument outside of batch_argnums",
            where=line_here(),
            fix=f"use one of {sorted(arguments)}",
        )
    if index is None:
        return None
    if not 0 <= index < len(elements):
        raise ProgramError(
            f"state={{{argnum}: {index}}}, but the result has {len(elements)} elements", where=line_here()
        )
    argument, element = arguments[argnum], elements[index]
    if argument.signature != element.signature:
        raise ProgramError(
            f"result {index} can't be the next value of argument {argnum}: {difference(argument, element)}",
            where=line_here(),
            fix="return state with the structure, shapes and dtypes that it came with",
        )
    return index


def check_unchanged(argument: StepPart, element: StepPart) -> None:
    """Raises a ProgramError if an argument that is updated in place has other shapes or dtypes afterwards."""
    if argument.signature != element.signature:
        raise ProgramError(
            f"the step changes a shape or a dtype of {argument.name} in place: {difference(argument, element)}",
            where=line_here(),
            fix="convert it back in the step",
        )


def _refuse_ambiguous(argnums: Sequence[int], nexts: Sequence[StepPart], arguments: Mapping[int, StepPart]) -> None:
    names = ", ".join(f"{argnum} ({arguments[argnum].name})" for argnum in argnums)
    raise ProgramError(
        f"cannot tell the next value of argument{'s' * (len(argnums) > 1)} {names} from {len(nexts)} results",
        where=line_here(),
        why=f"result{'s' * (len(nexts) > 1)} {', '.join(str(e.index) for e in nexts)} have the same tree, shapes and"
        " dtypes",
        fix=f"say state={{{argnums[0]}: {nexts[0].index}}}; None instead of an index for read-only arguments",
    )


def _refuse_changed(argument: StepPart, elements: Sequence[StepPart], dependencies: Sequence[int]) -> None:
    """Refuses an argument that is clearly meant to be state, but whose next value is of another kind."""
    for element in elements:
        if not element.reads(argument, dependencies) or not _clearly_next(argument, element):
            continue
        number = argument.leaves[0].argnum
        raise ProgramError(
            f"the step changes the structure, a shape or a dtype of its state: {difference(argument, element)}",
            where=line_here(),
            why=f"result {element.index} looks like the next value of argument {number}",
            fix=f"convert it back in the step, or say state={{{number}: None}} if the argument is read only",
        )


def _clearly_next(argument: StepPart, element: StepPart) -> bool:
    if argument.bare or element.bare:
        same_shape = argument.bare and element.bare and argument.leaves[0].shape == element.leaves[0].shape
        return same_shape and bool(argument.leaves[0].shape) and argument.leaves[0].dtype != element.leaves[0].dtype
    if argument.tree == element.tree:
        return True
    ours, theirs = _inner_paths(argument), _inner_paths(element)
    kinds = (argument.tree.node_data()[0], element.tree.node_data()[0])
    return kinds[0] is kinds[1] and 2 * len(ours & theirs) > len(ours)


def difference(argument: StepPart, element: StepPart) -> str:
    """The first leaf in which two parts differ, with both shapes and dtypes."""
    if argument.tree != element.tree:
        ours, theirs = _inner_paths(argument), _inner_paths(element)
        for title, paths in (("lost", ours - theirs), ("gained", theirs - ours)):
            if paths:
                return f"{argument.name} {title} {', '.join(sorted(paths)[:3])}"
        return f"the tree was {argument.tree} and becomes {element.tree}"
    for old, new in zip(argument.leaves, element.leaves, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"{old.path} is {_aval(old)} and becomes {_aval(new)}"
    return f"static leaves of {argument.name} change"


def _aval(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _inner_paths(part: StepPart) -> set[str]:
    """Leaf paths below the root: ``['w']`` of ``state['w']`` and of ``result[0]['w']``."""
    return {leaf.path[len(part.name) :] for leaf in part.leaves}
