"""A module as contracts read it: what several of them need is read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function, nested_operations


class ModuleView:
    """A module that does not change while contracts read it."""

    def __init__(self, module: ir.Module) -> None:
        self.module, self.root = module, module.operation

    @cached_property
    def main(self) -> ir.Operation:
        """``@main``."""
        return main_function(self.module)

    @cached_property
    def ops(self) -> list[ir.Operation]:
        """All ops of ``@main``, those of loops and branches included."""
        return nested_operations(self.main)

    @cached_property
    def flow(self) -> MainDataflow:
        """The data flow of ``@main``."""
        return MainDataflow.of(self.main)


def verify_contracts(module: ir.Module, contracts: Mapping[str, Callable[[ModuleView], None]]) -> None:
    """Verify some contracts, by their names; the first that is broken is named in the error."""
    view = ModuleView(module)
    for name, verify in contracts.items():
        try:
            verify(view)
        except PassError as error:
            raise PassError(
                f"contract {name!r} is broken: {error.message}", where=error.where, fix=error.fix, place=error.place
            ) from error
