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

    def conflict(self, at_boundaries: bool) -> tuple[int, str]:
        """The first op (as a position in the order) that has no stage left, and why.

        Values go to later stages only, so an op is on no lower stage than the ops before it. If that leaves a stage to
        every op, then it is the cuts that can't be made: at the given boundaries, or with weight on every stage.
        """
        low, cause = 0, 0
        for place, choice in enumerate(self.choices()):
            if choice is None:
                continue
            if not choice:
                return place, f"one op reads {' and '.join(map(self.pinned.text, self.arguments[place]))}"
            above = [stage for stage in choice if stage >= low]
            if not above:
                late = min(self.arguments[place], key=lambda argument: max(self.pinned.of[argument]))
                return place, f"{self.pinned.text(late)} is read after {self.pinned.text(cause)}"
            if min(above) > low:
                low = min(above)
                cause = max(self.arguments[place], key=lambda argument: min(self.pinned.of[argument]))
        place = next(place for place, arguments in enumerate(self.arguments) if arguments)
        text = f"{self.pinned.text(self.arguments[place][0])} and the arguments that are read after it leave "
        if at_boundaries:
            return place, text + "no cut at the program's stage boundaries"
        return place, text + f"one of {self.pinned.num_stages} stages without a product or convolution"
