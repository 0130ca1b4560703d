"""The contract of cloned cheap ops: what a stage can compute itself is not sent to it."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import argument_roles
from bactrian.passes.ir.cloning import StageRule, stage_keys

_SMALL_BYTES = 256  # as clone-cheap-ops has it by default


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 6."""
    main = view.main
    flow = view.flow
    keys = stage_keys(flow)
    is_cheap = StageRule(flow, argument_roles(main), _SMALL_BYTES)
    for reader, key in enumerate(keys):
        for value in flow.operands[reader]:
            producer = flow.producer[value]
            if producer < 0 or key is None or keys[producer] in (None, key):
                continue
            if is_cheap(producer, key):
                stages = f"from stage {flow.stages[producer]} to stage {flow.stages[reader]}"
                raise error_at(PassError, flow.ops[producer], f"what is cheap to compute again goes {stages}")
