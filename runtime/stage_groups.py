"""Which ranks run each stage. No jax."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from bactrian.passes.frame.errors import ConfigError


@dataclass(frozen=True)
class StageGroups:
    """Stages dealt to groups of consecutive ranks, of which all run the same stages.

    Attributes:
        of_stage: the group of each stage.
        sizes: the ranks of each group.
    """

    of_stage: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Of all groups."""
        return sum(self.sizes)

    @cached_property
    def _ranks(self) -> tuple[range, ...]:
        ends = list(itertools.accumulate(self.sizes))
        return tuple(range(end - size, end) for end, size in zip(ends, self.sizes, strict=True))

    def ranks(self, group: int) -> range:
        """Those of one group."""
        return self._ranks[group]

    def of_rank(self, rank: int) -> int:
        """The group of a rank."""
        return next(group for group, ranks in enumerate(self._ranks) if rank in ranks)


def deal_stages(sizes: Sequence[int], devices_per_rank: int, num_ranks: int) -> StageGroups:
    """Stages dealt to groups of ranks.

    They are dealt round, so that consecutive stages are on different ranks. Where stages would then share devices, and
    need not if they lie along the ranks in their order, they do that. Ranks of one group make the same calls, so its
    stages take equally many ranks.

    Args:
        sizes: the devices of each stage's mesh: of a rank at most, or those of several whole ranks.
        devices_per_rank: how many each rank has.
        num_ranks: that there are.

    Raises:
        ConfigError: there are more ranks than stages have use for, or fewer than can be dealt to.

    >>> deal_stages([1, 1, 1], 1, 2)
    StageGroups(of_stage=(0, 1, 0), sizes=(1, 1))
    >>> deal_stages([4, 2], 2, 3)
    StageGroups(of_stage=(0, 1), sizes=(2, 1))
    >>> deal_stages([4, 2, 2], 4, 2)
    StageGroups(of_stage=(0, 1, 1), sizes=(1, 1))
    """
    ranks = [max(1, size // devices_per_rank) for size in sizes]
    round_robin = {groups.num_ranks: groups for groups in _dealt_round(ranks)}
    dealt = round_robin.get(num_ranks)
    if dealt is None or _shares_devices(dealt, sizes, devices_per_rank):
        in_line = _in_line(sizes, ranks, devices_per_rank, num_ranks)
        dealt = in_line or dealt
    if dealt is None:
        lying = (_in_line(sizes, ranks, devices_per_rank, count) for count in range(1, sum(ranks)))
        raise _do_not_fit(ranks, num_ranks, sorted({*round_robin, *(each.num_ranks for each in lying if each)}))
    return dealt


def _dealt_round(ranks: Sequence[int]) -> Iterator[StageGroups]:
    """Stages dealt round to all numbers of groups whose stages take equally many ranks."""
    stages = range(len(ranks))
    for count in range(1, len(stages) + 1):
        if all(ranks[stage] == ranks[stage % count] for stage in stages):
            yield StageGroups(tuple(stage % count for stage in stages), tuple(ranks[:count]))


def _shares_devices(groups: StageGroups, sizes: Sequence[int], devices_per_rank: int) -> bool:
    held = [0] * len(groups.sizes)
    for group, size in zip(groups.of_stage, sizes, strict=True):
        held[group] += size
    return any(size > devices_per_rank * ranks for size, ranks in zip(held, groups.sizes, strict=True))


def _in_line(sizes: Sequence[int], ranks: Sequence[int], devices_per_rank: int, num_ranks: int) -> StageGroups | None:
    """Stages along the ranks, in their order and without shared devices; None if these don't come out even.

    The first ones that fit into a rank together do so, until there are as many ranks as the rest needs.
    """
    of_stage, taken, free, missing = list[int](), list[int](), 0, sum(ranks) - num_ranks
    for size, own in zip(sizes, ranks, strict=True):
        if missing > 0 and own == 1 and size <= free:
            missing, free = missing - 1, free - size
        else:
            taken.append(own)
            free = devices_per_rank - size if own == 1 else 0
        of_stage.append(len(taken) - 1)
    return None if missing else StageGroups(tuple(of_stage), tuple(taken))


def _do_not_fit(ranks_of_stage: Sequence[int], num_ranks: int, fitting: Sequence[int]) -> ConfigError:
    stages, each = len(ranks_of_stage), ranks_of_stage[0]
    is_equal = len(set(ranks_of_stage)) == 1
    if is_equal:
        whose = f"a stage belongs to {'one rank' if each == 1 else f'{each} ranks'}"
    else:
        whose = f"stages belong to {', '.join(map(str, ranks_of_stage))} ranks"
    counts = f"{fitting[0]} to {fitting[-1]}" if each == 1 and is_equal and stages > 1 else _one_of(fitting)
    other = f", or ask for num_stages={num_ranks // each}" if is_equal and num_ranks % each == 0 else ""
    return ConfigError(
        f"the plan has {stages} stage{'s' * (stages > 1)}, but {num_ranks} ranks were started",
        why=f"{whose}, every rank has a stage, and the ranks of a mesh run the same stages",
        fix=f"start {counts} ranks{other}",
    )


def _one_of(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
