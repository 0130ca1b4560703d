"""What a stage of consecutive layers takes on a mesh, with so many microbatches in flight: the least seconds that fit.

A stage chooses an option of every layer. On each device there is the layers' state, what is kept for every microbatch in
flight, and the working memory of the layer that needs most; their sum must fit. Seconds and bytes of layers add up, so
ranges of layers with equally many of each kind cost the same, and are counted once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.pipelining.host_line import Floats, Integers
from bactrian.passes.pipelining.layer_options import LayerOption

_Chosen = tuple[float, float, tuple[int, ...]]  # seconds, bytes, the option of each layer

_MOST_LEVELS = 6  # of the working memory

OptionsByKind = Sequence[Sequence[LayerOption]]


@dataclass(frozen=True)
class LayerRanges:
    """The ranges of consecutive layers, by how many layers of each kind they have.

    Attributes:
        kinds: of each layer.
        classes: of the range from layer ``i`` to before layer ``j`` at ``[i, j]``: the number of its class, ``-1`` where
            it is empty.
        steps: of each class: the class without the last layer (``-1`` if that was all), and the kind of that layer.
        lengths: layers of each class.
    """

    kinds: tuple[int, ...]
    classes: Integers
    steps: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, kinds: Sequence[int]) -> LayerRanges:
        """The ranges of layers of these kinds."""
        count, num_kinds = len(kinds), max(kinds) + 1
        classes = np.full((count + 1, count + 1), -1, np.int64)
        numbers: dict[tuple[int, ...], int] = {}
        steps, lengths = list[tuple[int, int]](), list[int]()
        for length in range(1, count + 1):
            for first in range(count - length + 1):
                end = first + length
                key = tuple(np.bincount(kinds[first:end], minlength=num_kinds))
                if key not in numbers:
                    numbers[key] = len(steps)
                    steps.append((int(classes[first, end - 1]), kinds[end - 1]))
                    lengths.append(length)
                classes[first, end] = numbers[key]
        return cls(tuple(kinds), classes, tuple(steps), tuple(lengths))


def least_updates(options: OptionsByKind, ranges: LayerRanges) -> Floats:
    """By class of ranges, the fewest seconds of the update, whatever memory says; infinite where a kind has no options."""
    least = [min((option.update_seconds for option in of_kind), default=math.inf) for of_kind in options]
    return _sums(least, ranges)


def least_seconds(
    options: OptionsByKind, ranges: LayerRanges, in_flight: int, memory_bytes: float, longest: float = math.inf
) -> Floats:
    """By class of ranges, the fewest seconds of a microbatch, forward and backward, of choices that fit into memory.

    For each bound on the working memory, the choices that no other beats in both bytes and seconds are grown by one layer at
    a time. It is exact where options have no more than six working memories; of more, every so many are such bounds.

    Args:
        options: by kind of layer.
        ranges: of the layers.
        in_flight: microbatches that the stage holds at most.
        memory_bytes: of a device.
        longest: what takes more seconds is of no interest.

    Returns:
        Seconds by class; infinite where nothing fits, or all that does takes longer than the longest.
    """
    best = np.full(len(ranges.steps), math.inf)
    fastest = _sums([min((_seconds(o) for o in of_kind), default=math.inf) for of_kind in options], ranges)
    for level in _levels(options):
        usable = [[option for option in of_kind if option.working_bytes <= level] for of_kind in options]
        best = np.minimum(best, _least_within(usable, ranges, in_flight, memory_bytes - level, longest))
        if (best[fastest <= longest] <= fastest[fastest <= longest]).all():
            break
    return best


def _least_within(
    options: OptionsByKind, ranges: LayerRanges, in_flight: int, memory_bytes: float, longest: float
) -> Floats:
    """`least_seconds` for what is left of memory beside the working memory."""
    fronts = [_front([(_held(o, in_flight), _seconds(o)) for o in of_kind]) for of_kind in options]
    heaviest = max((float(memory[0]) for memory, _ in fronts if len(memory)), default=0.0)
    found = np.full(len(ranges.steps), math.inf)
    start, none = (np.zeros(1), np.zeros(1)), (np.zeros(0), np.zeros(0))
    choices: list[tuple[Floats, Floats]] = []
    for number, (before, kind) in enumerate(ranges.steps):
        base = choices[before] if before >= 0 else start
        if not len(base[0]):
            choices.append(none)
            continue
        memory = (base[0][:, None] + fronts[kind][0]).ravel()
        seconds = (base[1][:, None] + fronts[kind][1]).ravel()
        fits = (memory <= memory_bytes) & (seconds <= longest)
        # Where the fastest of all that may follow fits as well, leaner choices are of no use.
        spare = memory_bytes - heaviest * (len(ranges.kinds) - ranges.lengths[number])
        choices.append(_pruned(memory[fits], seconds[fits], spare))
        if fits.any():
            found[number] = choices[-1][1][0]
    return found


def _front(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    memory = np.array([point[0] for point in points])
    return _pruned(memory, np.array([point[1] for point in points]), -math.inf)


def _pruned(memory: Floats, seconds: Floats, spare: float) -> tuple[Floats, Floats]:
    """Those that no other beats in both, the fastest first; none behind the first that leaves enough memory."""
    if len(memory) > 1:
        order = np.lexsort((memory, seconds))
        memory, seconds = memory[order], seconds[order]
        keep = np.ones(len(memory), bool)
        keep[1:] = memory[1:] < np.minimum.accumulate(memory)[:-1]
        memory, seconds = memory[keep], seconds[keep]
        enough = np.flatnonzero(memory <= spare)
        if len(enough):
            memory, seconds = memory[: enough[0] + 1], seconds[: enough[0] + 1]
    return memory, seconds


def choose_options(
    options: OptionsByKind, kinds: Sequence[int], in_flight: int, memory_bytes: float, update_weight: float
) -> tuple[int, ...] | None:
    """For each layer of one stage the number of its option, so that seconds are least and memory fits.

    Args:
        options: by kind of layer.
        kinds: of the stage's layers.
        in_flight: microbatches that the stage holds at most.
        memory_bytes: of a device.
        update_weight: what a second of the update counts, beside one of a microbatch.

    Returns:
        None where nothing fits.
    """
    best: _Chosen | None = None
    for level in _levels([options[kind] for kind in sorted(set(kinds))]):
        fronts = {
            kind: _undominated(
                [
                    (_seconds(option) + update_weight * option.update_seconds, _held(option, in_flight), (number,))
                    for number, option in enumerate(options[kind])
                    if option.working_bytes <= level
                ]
            )
            for kind in set(kinds)
        }
        heaviest = max((front[0][1] for front in fronts.values() if front), default=0.0)
        choices: list[_Chosen] = [(0.0, 0.0, ())]
        for left, kind in zip(range(len(kinds) - 1, -1, -1), kinds, strict=True):
            grown = [
                (seconds + own, memory + held, (*chosen, *number))
                for seconds, memory, chosen in choices
                for own, held, number in fronts[kind]
                if memory + held <= memory_bytes - level
            ]
            choices = _undominated(grown)
            spare = memory_bytes - level - heaviest * left
            enough = next((place for place, choice in enumerate(choices) if choice[1] <= spare), len(choices))
            choices = choices[: enough + 1]
        if choices and (best is None or choices[0][:2] < best[:2]):
            best = choices[0]
    return None if best is None else _sorted_by_kind(best[2], options, kinds)


def _sorted_by_kind(chosen: Sequence[int], options: OptionsByKind, kinds: Sequence[int]) -> tuple[int, ...]:
    """The same options, layers of a kind that compute the same again being neighbours: a stage then has fewer different
    surroundings of a layer, and its shardings are found sooner."""
    layers = sorted(range(len(kinds)), key=lambda layer: kinds[layer])
    numbers = sorted(
        zip(kinds, chosen, strict=True), key=lambda each: (each[0], options[each[0]][each[1]].remat, each[1])
    )
    found = dict(zip(layers, (number for _, number in numbers), strict=True))
    return tuple(found[layer] for layer in range(len(kinds)))


def _levels(options: OptionsByKind) -> list[float]:
    """Bounds on the working memory that are tried, the largest first."""
    levels = sorted({option.working_bytes for of_kind in options for option in of_kind}, reverse=True)
    return levels[:: max(1, -(-len(levels) // _MOST_LEVELS))]


def _undominated(choices: list[_Chosen]) -> list[_Chosen]:
    kept, least = list[_Chosen](), math.inf
    for choice in sorted(choices):
        if choice[1] < least:
            least = choice[1]
            kept.append(choice)
    return kept


def _sums(by_kind: Sequence[float], ranges: LayerRanges) -> Floats:
    """By class, the sum of what each layer's kind has."""
    found = np.zeros(len(ranges.steps))
    for number, (before, kind) in enumerate(ranges.steps):
        found[number] = by_kind[kind] + (found[before] if before >= 0 else 0.0)
    return found


def _seconds(option: LayerOption) -> float:
    return option.forward_seconds + option.backward_seconds


def _held(option: LayerOption, in_flight: int) -> float:
    return option.state_bytes + in_flight * option.kept_bytes
