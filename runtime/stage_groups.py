"""Which ranks run each stage. No jax."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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


def deal_stages(ranks_of_stage: Sequence[int], num_ranks: int) -> StageGroups:
    """Stages dealt round to groups of ranks, consecutive stages to different ones.

    Args:
        ranks_of_stage: how many ranks the devices of each stage's mesh belong to.
        num_ranks: that there are.

    Raises:
        ConfigError: there are more ranks than stages have use for, or fewer than can be dealt to.

    >>> deal_stages([1, 1, 1], 2)
    StageGroups(of_stage=(0, 1, 0), sizes=(1, 1))
    >>> deal_stages([2, 1], 3)
    StageGroups(of_stage=(0, 1), sizes=(2, 1))
    """
    stages = range(len(ranks_of_stage))
    fitting = dict[int, int]()  # ranks that are needed -> groups
    for groups in range(1, len(stages) + 1):
        if all(ranks_of_stage[stage] == ranks_of_stage[stage % groups] for stage in stages):
            fitting[sum(ranks_of_stage[:groups])] = groups
    if num_ranks not in fitting:
        raise _do_not_fit(ranks_of_stage, num_ranks, list(fitting))
    groups = fitting[num_ranks]
    return StageGroups(tuple(stage % groups for stage in stages), tuple(ranks_of_stage[:groups]))


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
