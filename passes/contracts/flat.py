"""The contract of flat modules: one straight-line function."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 1."""
    main = view.main
    for each in view.module.body.operations:
        op = each.operation
        if op.name == "func.func" and op != main:
            raise error_at(PassError, op, f"there is a function besides @main: {op.attributes['sym_name']}")
    if len(main.regions[0].blocks) != 1:
        raise error_at(PassError, main, f"@main has {len(main.regions[0].blocks)} blocks, must be straight-line")
    for op in view.ops:
        if op.name == "func.call" or op.name.startswith("chlo."):
            raise error_at(PassError, op, f"{op.name} is left")
