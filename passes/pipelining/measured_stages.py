"""Stages that were measured, and how they correct what the search takes all stages to need."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.spec import MeshAxes, axes_text, parse_axes
from bactrian.passes.pipelining.host_line import Floats
from bactrian.passes.pipelining.stage_costs import LayerRanges

_WORDS = re.compile(r"(\d+)-(\d+) on (\S+) of (\d+) takes (\S+) (\S+)")


@dataclass(frozen=True)
class MeasuredStage:
    """A stage that was compiled and timed, or that can't run.

    Attributes:
        first_layer, end_layer: its layers, from the first to before the end.
        mesh: of its devices.
        num_microbatches: of the step, which say how large one is.
        seconds_factor: its measured seconds of a microbatch, as a multiple of those of its options; infinite where it can't
            run.
        update_factor: the same of what is done once per step.
    """

    first_layer: int
    end_layer: int
    mesh: MeshAxes
    num_microbatches: int
    seconds_factor: float
    update_factor: float

    @classmethod
    def unusable(cls, first_layer: int, end_layer: int, mesh: MeshAxes, num_microbatches: int) -> MeasuredStage:
        """A stage that can't run."""
        return cls(first_layer, end_layer, mesh, num_microbatches, math.inf, math.inf)

    @property
    def is_usable(self) -> bool:
        """Whether it can run."""
        return math.isfinite(self.seconds_factor)

    def __str__(self) -> str:
        layers, factors = f"{self.first_layer}-{self.end_layer}", f"{self.seconds_factor!r} {self.update_factor!r}"
        return f"{layers} on {axes_text(self.mesh)} of {self.num_microbatches} takes {factors}"


def stages_text(stages: Sequence[MeasuredStage]) -> str:
    """Measured stages as an option of a pass, as in ``0-4 on data=2 of 8 takes 1.5 1.0; ...``."""
    return "; ".join(map(str, stages))


def parse_stages(text: str) -> tuple[MeasuredStage, ...]:
    """The stages of `stages_text`.

    Raises:
        ConfigError: it is none.
    """
    return tuple(_parse(words.strip()) for words in text.split(";") if words.strip())


def _parse(words: str) -> MeasuredStage:
    match = _WORDS.fullmatch(words)
    try:
        if match is None:
            raise ValueError
        first, end, mesh, count, seconds, update = match.groups()
        stage = MeasuredStage(int(first), int(end), parse_axes(mesh), int(count), float(seconds), float(update))
        if stage.first_layer >= stage.end_layer or not stage.seconds_factor > 0 or not stage.update_factor > 0:
            raise ValueError
        return stage
    except ValueError:
        raise ConfigError(
            f"cannot read measured stage {words!r}",
            fix="as in '0-4 on data=2 of 8 takes 1.5 1.0': layers 0 to 3, of 8 microbatches, and two factors above 0",
        ) from None


@dataclass(frozen=True)
class Corrections:
    """By how much stages on any mesh take longer than their options say.

    A stage with as many layers of each kind as one that was measured on its mesh, at this number of microbatches, takes as
    much longer as that did; others there take as much longer as the mean. Where nothing was measured, stages take what
    their options say, or less by the least factor: what might be better is to be measured too. What can't run says nothing
    of others.

    Attributes:
        stages: that were measured.
        num_microbatches: of the step that is searched for.
    """

    stages: tuple[MeasuredStage, ...]
    num_microbatches: int

    def of_seconds(self, mesh: MeshAxes, ranges: LayerRanges) -> Floats:
        """Factors of the seconds of a microbatch, by class of layer ranges."""
        return self._factors(mesh, ranges, lambda stage: stage.seconds_factor)

    def of_updates(self, mesh: MeshAxes, ranges: LayerRanges) -> Floats:
        """Factors of the seconds of the update, by class of layer ranges."""
        return self._factors(mesh, ranges, lambda stage: stage.update_factor)

    def _factors(self, mesh: MeshAxes, ranges: LayerRanges, factor: Callable[[MeasuredStage], float]) -> Floats:
        usable = [stage for stage in self.stages if stage.is_usable]
        near = [stage for stage in self.stages if (stage.mesh, stage.num_microbatches) == (mesh, self.num_microbatches)]
        factors = [factor(stage) for stage in near if stage.is_usable]
        others = fmean(factors) if factors else min([1.0, *map(factor, usable)])
        found, own = np.full(len(ranges.steps), others), dict[int, list[float]]()
        for stage in near:
            own.setdefault(int(ranges.classes[stage.first_layer, stage.end_layer]), []).append(factor(stage))
        for number, equal in own.items():
            found[number] = fmean(equal)
        return found
