"""The step time of a pipeline in closed form: what the search for stages makes least.

A microbatch passes all stages forward and back once; in the steady state one ends every period; the update comes last::

    step = sum of t_s + sum of x_s + (m - 1) period + max u_s

with ``t_s`` seconds of stage ``s`` for a microbatch, forward and backward, ``x_s`` seconds of the round trip between stages
``s`` and ``s + 1``, ``u_s`` seconds of the update, ``m`` microbatches. With 1F1B and its eager form it is not
below what the events of a step take (`pipeline_events`), and mostly a percent above; with GPipe, whose forwards and
backwards may have different slowest stages, it is not above. So the best plans are simulated afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_ABOVE = 0.12
"""The share by which the closed form may exceed the events: of pipelines no farther apart, the slower may be the faster."""


def period_seconds(
    seconds: Sequence[float], round_trips: Sequence[float], in_flight: Sequence[int], num_microbatches: int
) -> float:
    """Seconds between the ends of two microbatches in the steady state: the slowest stage, or a round trip.

    A microbatch that leaves stage ``i`` passes the stages to ``j``, turns there, and comes back. Stage ``i`` lets
    ``k_i - k_j + 1`` of them be on that way at once, so that one needs at least a part of the way's seconds::

        max over i <= j of (t_i + ... + t_j + x_i + ... + x_(j-1)) / (k_i - k_j + 1)

    Where stage ``i`` holds all microbatches of the step, it waits for none of them.

    Args:
        seconds: of each stage for a microbatch, forward and backward.
        round_trips: seconds between each stage and the next, there and back.
        in_flight: microbatches that each stage holds at most.
        num_microbatches: of a step.

    >>> period_seconds([2.0, 2.0], [1.0], [2, 1], 8)
    2.5
    >>> period_seconds([2.0, 2.0], [1.0], [3, 1], 8)
    2.0
    """
    period = max(seconds)
    for first in range(len(seconds)):
        if in_flight[first] >= num_microbatches:
            continue
        total = seconds[first]
        for last in range(first + 1, len(seconds)):
            total += round_trips[last - 1] + seconds[last]
            period = max(period, total / (in_flight[first] - in_flight[last] + 1))
    return period


def step_seconds(
    seconds: Sequence[float],
    round_trips: Sequence[float],
    updates: Sequence[float],
    in_flight: Sequence[int],
    num_microbatches: int,
) -> float:
    """Seconds of a step.

    Args:
        seconds, round_trips, in_flight, num_microbatches: as `period_seconds` takes them.
        updates: seconds of each stage once per step.

    >>> step_seconds([2.0, 2.0], [1.0], [0.5, 1.0], [2, 1], 8)
    23.5
    """
    period = period_seconds(seconds, round_trips, in_flight, num_microbatches)
    return sum(seconds) + sum(round_trips) + (num_microbatches - 1) * period + max(updates)
