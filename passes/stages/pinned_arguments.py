"""Arguments pinned to stages by an earlier step, and the ops that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.frame.location import name_stack
from bactrian.passes.ir.attributes import NUM_STAGES, argument_pinned_stages, integer_attribute
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function


@dataclass(frozen=True)
class PinnedArguments:
    """The stages that hold the arguments, by argument number, out of ``num_stages``."""

    num_stages: int
    of: Mapping[int, tuple[int, ...]]
    names: Mapping[int, str]

    @classmethod
    def read(cls, module: ir.Module, flow: MainDataflow) -> PinnedArguments | None:
        """What the module says; None if no argument is pinned."""
        of = argument_pinned_stages(main_function(module))
        if not of:
            return None
        num_stages = integer_attribute(module.operation, NUM_STAGES) or 0
        names = {a: name_stack(flow.values[a].location) or f"argument {a}" for a in of}
        return cls(max(num_stages, *(1 + stages[-1] for stages in of.values())), of, names)

    def text(self, argument: int) -> str:
        """``state['w'] (on stages 0 and 2)``."""
        *others, last = map(str, self.of[argument])
        stages = f"stages {', '.join(others)} and {last}" if others else f"stage {last}"
        return f"{self.names[argument]} (on {stages})"


@dataclass(frozen=True)
class PinnedReads:
    """The pinned arguments that each op of an order reads, itself or through ops that are cheap to clone."""

    pinned: PinnedArguments
    arguments: Sequence[tuple[int, ...]]

    def only(self, keep: Sequence[bool]) -> PinnedReads:
        """Without the arguments that are not to be kept."""
        return PinnedReads(self.pinned, [tuple(a for a in arguments if keep[a]) for arguments in self.arguments])

    def choices(self) -> list[frozenset[int] | None]:
        """The stages that each op may be on: those that hold all that it reads; None for any."""
        return [
            frozenset.intersection(*(frozenset(self.pinned.of[a]) for a in arguments)) if arguments else None
            for arguments in self.arguments
        ]

    def last(self, place: int) -> int | None:
        """Of the arguments that the op at ``place`` reads, the one that is only on the latest stages; None without any."""
        return max(self.arguments[place], key=lambda argument: min(self.pinned.of[argument]), default=None)

    def conflict(self, place: int, cause: int | None) -> str:
        """Why no stage is left to the op at ``place``, which reads what ``cause`` keeps from earlier stages."""
        own = self.arguments[place]
        if cause is None or not frozenset.intersection(*(frozenset(self.pinned.of[a]) for a in own)):
            return f"one op reads {' and '.join(map(self.pinned.text, own))}"
        early = min(own, key=lambda argument: max(self.pinned.of[argument]))
        return f"{self.pinned.text(early)} is read after {self.pinned.text(cause)}"
