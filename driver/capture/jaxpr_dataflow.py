"""A traced step as straight-line data flow: what is above the gradient boundary, what below, and what depends on what.

Calls of jitted functions are opened; every other equation stays one operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend import core

from bactrian.driver.capture.gradient_boundary import GRADIENT_BOUNDARY, MICROBATCH_INDEX
from bactrian.driver.capture.missing_boundary import missing_boundary
from bactrian.driver.source import line_of_equation
from bactrian.passes.frame.errors import ProgramError

_MAX_LINES_REPORTED = 5


@dataclass(frozen=True)
class JaxprOperation:
    """One equation on numbered values; ``callers`` are the calls it was opened from, innermost first."""

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[Any, ...] = ()

    @property
    def line(self) -> str:
        """The user's line."""
        return line_of_equation(self.equation, self.callers)


@dataclass(frozen=True, eq=False)
class JaxprDataflow:
    """A closed jaxpr as a list of operations in order.

    Values ``0 .. num_inputs - 1`` are the inputs; ``constants`` are literals and closed-over arrays.
    """

    num_inputs: int
    constants: dict[int, Any]
    operations: tuple[JaxprOperation, ...]
    outputs: tuple[int, ...]
    boundary: JaxprOperation
    index: int  # the value of bactrian.microbatch_index

    @property
    def kinds(self) -> tuple[str, ...]:
        """``loss``, ``aux``, ``gradient`` or ``output``: what each operand of the boundary is."""
        return _words(self.boundary, "kinds")

    @property
    def reductions(self) -> tuple[str, ...]:
        """How each operand of the boundary is reduced over the microbatches."""
        return _words(self.boundary, "reductions")

    def above(self) -> list[JaxprOperation]:
        """What a microbatch does: the ancestors of the boundary's operands."""
        return self.ancestors(self.boundary.inputs)

    def below(self) -> list[JaxprOperation]:
        """What is done once: the ancestors of the results, down to the boundary."""
        return self.ancestors(self.outputs)

    def ancestors(self, values: Iterable[int]) -> list[JaxprOperation]:
        """What computes some values, not looking through the boundary."""
        needed, kept = set(values), list[JaxprOperation]()
        for operation in reversed(self.operations):
            if operation is not self.boundary and needed.intersection(operation.outputs):
                needed.update(operation.inputs)
                kept.append(operation)
        return kept[::-1]

    def dependencies(self) -> list[int]:
        """For each output, the inputs that it depends on, as a bit set."""
        known = {i: 1 << i for i in range(self.num_inputs)}
        for operation in self.operations:
            if operation is self.boundary:
                known.update(zip(operation.outputs, (known.get(i, 0) for i in operation.inputs), strict=True))
                continue
            union = 0
            for i in operation.inputs:
                union |= known.get(i, 0)
            known.update(dict.fromkeys(operation.outputs, union))
        return [known.get(i, 0) for i in self.outputs]

    def tainted(self, inputs: Iterable[int]) -> tuple[set[int], dict[int, JaxprOperation]]:
        """Values computed from ``inputs`` or the microbatch's number other than through the boundary, and by what."""
        tainted, by = {*inputs, self.index}, dict[int, JaxprOperation]()
        for operation in self.operations:
            if operation is not self.boundary and tainted.intersection(operation.inputs):
                tainted.update(operation.outputs)
                by.update(dict.fromkeys(operation.outputs, operation))
        return tainted, by


def flatten(closed: core.ClosedJaxpr) -> JaxprDataflow:
    """Straightens a traced step.

    Raises:
        ProgramError: there is no boundary, more than one, or one inside of a loop or another transformation; or the
            step has side effects.
    """
    _refuse_effects(closed.jaxpr)
    _refuse_double_donation(closed.jaxpr)
    inliner = _Inliner()
    inputs = [inliner.fresh() for _ in closed.jaxpr.invars]
    outputs = inliner.inline(closed.jaxpr, closed.consts, inputs)
    boundaries = [op for op in inliner.operations if is_call(op.equation, GRADIENT_BOUNDARY)]
    _refuse_hidden_boundaries(inliner.operations)
    if not boundaries:
        raise missing_boundary((op.equation, op.callers) for op in inliner.operations)
    if len(boundaries) > 1:
        lines = sorted({op.line for op in boundaries})
        raise ProgramError(
            f"the step has {len(boundaries)} gradient boundaries",
            where="; ".join(lines),
            why="one step takes one gradient: each boundary would be a pipeline of its own",
            fix="add the losses up inside one function, or use jax.grad for the inner ones",
        )
    index = next(op.outputs[0] for op in inliner.operations if is_call(op.equation, MICROBATCH_INDEX))
    return JaxprDataflow(
        len(inputs), inliner.constants, tuple(inliner.operations), tuple(outputs), boundaries[0], index
    )


def is_call(equation: Any, target: str) -> bool:
    """Whether an equation is the custom call ``target``."""
    return equation.primitive.name == "ffi_call" and equation.params["target_name"] == target


def nested_jaxprs(equation: Any) -> Iterator[core.Jaxpr]:
    """The jaxprs in an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def equations(jaxpr: core.Jaxpr, callers: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every equation, outermost first, with the equations that it is nested in, innermost first."""
    for equation in jaxpr.eqns:
        yield equation, callers
        for inner in nested_jaxprs(equation):
            yield from equations(inner, (equation, *callers))


class _Inliner:
    def __init__(self) -> None:
        self.operations: list[JaxprOperation] = []
        self.constants: dict[int, Any] = {}
        self._count = 0

    def fresh(self) -> int:
        self._count += 1
        return self._count - 1

    def constant(self, value: Any) -> int:
        number = self.fresh()
        self.constants[number] = value
        return number

    def inline(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int], callers: tuple[Any, ...] = ()
    ) -> list[int]:
        """Appends the operations of ``jaxpr``; returns the numbers of its results."""
        known: dict[Any, int] = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def number(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            operands = [number(v) for v in equation.invars]
            if is_jit(equation):
                inner = equation.params["jaxpr"]
                results = self.inline(inner.jaxpr, inner.consts, operands, (equation, *callers))
            else:
                results = [self.fresh() for _ in equation.outvars]
                self.operations.append(JaxprOperation(equation, tuple(operands), tuple(results), callers))
            known.update(zip(equation.outvars, results, strict=True))
        return [number(v) for v in jaxpr.outvars]


def is_jit(equation: Any) -> bool:
    """Whether an equation calls a jitted function."""
    return equation.primitive is core.primitives.jit_p


def _words(boundary: JaxprOperation, name: str) -> tuple[str, ...]:
    return tuple(dict(boundary.equation.params["attributes"])[name].split(","))


def _refuse_hidden_boundaries(operations: Iterable[JaxprOperation]) -> None:
    for operation in operations:
        for jaxpr in nested_jaxprs(operation.equation):
            for inner, callers in equations(jaxpr, (operation.equation, *operation.callers)):
                if is_call(inner, GRADIENT_BOUNDARY):
                    outer = operation.equation.primitive.name
                    raise ProgramError(
                        f"the gradient boundary is inside of `{outer}`" + (" or `vmap`" if outer == "scan" else ""),
                        where=line_of_equation(inner, callers),
                        why="everything above the boundary runs once per microbatch, everything below once per step",
                        fix="take the gradient at the top level of the step; the microbatches are the loop",
                    )


def _refuse_effects(jaxpr: core.Jaxpr) -> None:
    culprits = [
        (equation, callers)
        for equation, callers in equations(jaxpr)
        if not any(True for _ in nested_jaxprs(equation))
        and ("callback" in equation.primitive.name or (jaxpr.effects and equation.effects))
    ]
    if culprits:
        lines = sorted({f"{line_of_equation(e, callers)}: {e.primitive.name}" for e, callers in culprits})[
            :_MAX_LINES_REPORTED
        ]
        raise ProgramError(
            f"the step has {len(culprits)} side effect{'s' * (len(culprits) > 1)} or host callback"
            f"{'s' * (len(culprits) > 1)}",
            where="; ".join(lines[:_MAX_LINES_REPORTED]),
            why="parts of a step run on different machines, in another order, and more than once",
            fix="return the values (as aux of bactrian.value_and_grad) and print or save them after the step",
        )


def _refuse_double_donation(jaxpr: core.Jaxpr, callers: tuple[Any, ...] = ()) -> None:
    donated: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        for var in equation.invars:
            if not isinstance(var, core.Literal) and var in donated:
                raise ProgramError(
                    "a donated value was used a second time",
                    where=line_of_equation(equation, callers),
                    why=f"it was donated at {line_of_equation(donated[var], callers)}",
                    fix="drop donate_argnums from functions inside the step: state is donated by Bactrian",
                )
        if is_jit(equation):
            flags = equation.params["donated_invars"]
            gone = [v for v, flag in zip(equation.invars, flags, strict=True) if flag]
            donated.update((v, equation) for v in gone if not isinstance(v, core.Literal))
        for inner in nested_jaxprs(equation):
            _refuse_double_donation(inner, (equation, *callers))
