"""A captured step: the module, and what Python needs beside it (trees, static leaves, the jaxpr for the reference)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxlib.mlir import ir

from bactrian.driver.arrays.placed_arguments import PlacedArguments
from bactrian.driver.capture.argument_info import ArgumentInfo, ResultInfo
from bactrian.driver.capture.call_signature import (
    FlatCall,
    Parameters,
    aval_text,
    collective_call,
    flatten_call,
    merged,
)
from bactrian.driver.capture.jaxpr_dataflow import JaxprDataflow
from bactrian.driver.capture.module_attributes import write_placed
from bactrian.driver.capture.updated_in_place import write_back
from bactrian.driver.source import line_here
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ProgramError
from bactrian.passes.frame.phase_times import PhaseTime
from bactrian.runtime.lockstep import CollectiveCall


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured step. ``module()`` makes a fresh MLIR module of it in a context of its own.

    ``updated`` are the positional arguments that it updates in place; they are then part of the result's tree.
    """

    name: str
    bytecode: bytes = field(repr=False)
    fingerprint: str
    platform: str
    num_microbatches: int
    schedule: str
    forward_only: bool
    arguments: tuple[ArgumentInfo, ...] = field(repr=False)
    results: tuple[ResultInfo, ...] = field(repr=False)
    call_signature: tuple[Any, ...] = field(repr=False)
    out_tree: Any = field(repr=False)
    out_statics: tuple[tuple[int, Any], ...] = field(repr=False)
    dataflow: JaxprDataflow = field(repr=False)
    parameters: Parameters = field(repr=False)
    updated: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    phases: tuple[PhaseTime, ...] = field(default=(), repr=False)

    def module(self, placed: PlacedArguments | None = None) -> ir.Module:
        """A new module with locations, for passes to rewrite; ``placed`` says which stages hold arguments already."""
        with make_context(), ir.Location.unknown():
            module = ir.Module.parse(self.bytecode)
            if placed is not None:
                write_placed(module, placed)
            return module

    @property
    def text(self) -> str:
        """The module as text, with locations."""
        return self.text_with(None)

    def text_with(self, placed: PlacedArguments | None) -> str:
        """The module as text, with locations and the stages of placed arguments."""
        return str(self.module(placed).operation.get_asm(enable_debug_info=True))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The array leaves of a call, in the order of ``arguments``.

        Raises:
            ProgramError: shapes, dtypes, tree or static leaves differ from what was captured.
        """
        call = flatten_call(self.parameters, args, kwargs or {})
        if call.signature != self.call_signature:
            raise ProgramError(
                f"the arguments of {self.name} are not those it was captured with",
                where=line_here(),
                why=_difference(self, call),
            )
        return call.leaves

    def collective_call(self, kind: str) -> CollectiveCall:
        """A call of the step, or its compilation, as ranks compare it."""
        batch = [f"{info.path} {aval_text(info.shape, info.dtype)}" for info in self.arguments if info.role == "batch"]
        return collective_call(kind, self.name, self.call_signature, batch)

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The tree of the step's result from its array leaves; static leaves are put back."""
        return jax.tree.unflatten(self.out_tree, merged(list(results), self.out_statics))

    def returned(self, tree: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the step returns, once the arguments of the call that it updates in place have their new values."""
        if not self.updated:
            return tree
        result, objects = tree
        args = flatten_call(self.parameters, args, kwargs).args
        for argnum, new in zip(self.updated, objects, strict=True):
            write_back(args[argnum], new)
        return result


def _difference(captured: Captured, call: FlatCall) -> str:
    tree, avals, statics = captured.call_signature
    if tree != call.tree:
        return f"the tree was {tree} and is {call.tree}"
    if statics != call.statics:
        return "static leaves (functions, strings, settings) changed"
    for info, old, new in zip(captured.arguments, avals, call.signature[1], strict=True):
        if old != new:
            return f"{info.path} was {_aval_text(old)} and is {_aval_text(new)}"
    return "a static leaf compares unequal to itself"


def _aval_text(aval: tuple[tuple[int, ...], Any, bool]) -> str:
    shape, dtype, weak_type = aval
    return f"{dtype}{list(shape)}" + (" of weak type (as a Python number)" if weak_type else "")
