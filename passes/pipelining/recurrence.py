"""The recurrence over stages, layers and places on the line of hosts, for stages within limits.

Stages stand one behind the other on the line, from the first layer to the last, so that a stage's place says whether it lies
on several hosts, of which kind these are, and over which link it talks to its neighbours. For ``q`` stages that are left,
``i`` the first layer of them, ``p`` the first device and ``n`` the submesh of the first of them::

    G[q][n][i][p] = min over j       of C[q][n][i][j] + H[q - 1][n][j][p + size of n]
    H[q][s][i][p] = min over n, p'   of G[q][n][i][p'] + X(i, s, n)       with p' = p, or at the start of a later host

``C`` are the least seconds of a microbatch of layers ``i`` to before ``j`` (`stage_tables`), ``X`` those of the round trip
from a sender ``s`` that ends before device ``p``; what lies between ``p`` and ``p'`` stays idle. Behind the last layer, ``H``
is 0. A stage that begins later within a host has no advantage.

The period (`step_time.period_seconds`) must not exceed its limit ``T``. Of that, the recurrence knows the seconds of every
stage, and the round trip to the last stage, ``G[q] <= k[q] T`` where fewer than all microbatches may be in flight at the
first of ``q`` stages: no pipeline within the limits takes less than it says. `round_trip_search` has the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bactrian.passes.pipelining.host_line import Floats, HostLine, Integers, Submesh
from bactrian.passes.pipelining.pipeline_problem import Place
from bactrian.passes.pipelining.stage_tables import Limits, StageTables

SLACK = 1e-12  # of limits, for sums in other orders


@dataclass(frozen=True)
class Positions:
    """Places on the line in units of several devices, where all submeshes in use are made of such.

    Attributes:
        unit: devices.
        starts: where each submesh may begin.
        hosts: where hosts begin.
        next_host: of each position, the number of the first host that begins there or behind it.
        inside: the positions where no host begins.
    """

    unit: int
    starts: dict[Submesh, Integers]
    hosts: Integers
    next_host: Integers
    inside: Integers

    @classmethod
    def of(cls, line: HostLine, submeshes: list[Submesh]) -> Positions:
        per_host = [line.kinds[kind].num_devices for kind in line.hosts]
        unit = math.gcd(*per_host, *(submesh.num_devices for submesh in submeshes))
        hosts = np.array(line.first_devices) // unit
        all_positions = np.arange(line.num_devices // unit + 1)
        starts = {
            each: np.array([p // unit for p in line.places(each) if p % unit == 0], np.int64) for each in submeshes
        }
        inside = np.setdiff1d(all_positions[:-1], hosts)
        return cls(unit, starts, hosts, np.searchsorted(hosts, all_positions), inside)


class Recurrence:
    """What the recurrence says within limits.

    Attributes:
        submeshes: that stages may have within the limits.
        positions: of the line, in the largest unit of devices that these have in common.
        trips_between, trips_inside: seconds of round trips by sender, receiver and first layer of the receiver, between
            hosts, and within one; infinite where that has no room for another stage.
        stages: ``G`` by submesh, first layer and position, for 1, 2, ... stages.
        seconds: the least of it for a whole pipeline of 1, 2, ... stages.
    """

    def __init__(self, tables: StageTables, limits: Limits, allowance: float = math.inf) -> None:
        """``allowance``: sums of as many seconds or more are of no interest, and left out."""
        self.tables, self.limits, self.allowance = tables, limits, allowance
        self.submeshes = [each for each in tables.submeshes if tables.is_usable(each, limits)]
        self.positions = Positions.of(tables.problem.line, self.submeshes)
        self.trips_between, self.trips_inside = self._round_trips()
        self.stages: list[Floats] = []
        self.seconds: list[float] = []
        self._costs: dict[tuple[int, int], list[tuple[int, Floats]]] = {}
        if self.submeshes:
            self._fill()

    @property
    def least(self) -> float:
        """Of all numbers of stages; infinite where there is no pipeline within the limits."""
        return min(self.seconds, default=math.inf)

    def _round_trips(self) -> tuple[Floats, Floats]:
        """Seconds by sender, receiver and first layer of the receiver: between hosts, and within one, where it has room."""
        line = self.tables.problem.line
        nbytes = np.array([*self.tables.problem.border_bytes, 0.0])
        between = np.full((len(self.submeshes), len(self.submeshes), len(nbytes)), math.inf)
        inside = between.copy()
        for s, sender in enumerate(self.submeshes):
            for r, receiver in enumerate(self.submeshes):
                between[s, r] = line.round_trip(nbytes, sender, receiver, in_host=False)
                if all(each.num_devices < line.kinds[each.kind].num_devices for each in (sender, receiver)):
                    inside[s, r] = line.round_trip(nbytes, sender, receiver, in_host=True)
        return between, inside

    def _fill(self) -> None:
        shape = len(self.submeshes), self.tables.problem.num_layers + 1, len(self.positions.next_host)
        behind = np.full(shape, math.inf)
        behind[:, -1] = 0.0
        known = self.tables.problem.fixed.known_stages
        for left in range(1, self.tables.most_stages + 1):
            stage = self._stage(left, behind)
            stage[stage + self.tables.before[:, None] >= self.allowance] = math.inf
            self.stages.append(stage)
            whole = float(stage[:, 0, self.positions.hosts].min())
            self.seconds.append(whole if known in (None, left) else math.inf)
            if not np.isfinite(stage).any():
                break
            behind = self._seen_from_before(stage)

    def _stage(self, left: int, behind: Floats) -> Floats:
        """``G`` for so many stages, from ``H`` behind the first of them."""
        stage = np.full_like(behind, math.inf)
        for number, submesh in enumerate(self.submeshes):
            starts = self.positions.starts[submesh]
            following = behind[number][:, starts + submesh.num_devices // self.positions.unit]
            best = np.full_like(following, math.inf)
            for num_layers, costs in self.costs(left, number):
                np.minimum(best[:-num_layers], costs[:, None] + following[num_layers:], out=best[:-num_layers])
            stage[number][:, starts] = best
        if self.tables.waits(left):
            stage[stage > self.tables.in_flight[left] * self.limits.period * (1 + SLACK)] = math.inf
        return stage

    def _seen_from_before(self, stage: Floats) -> Floats:
        """``H``, from ``G`` of as many stages."""
        behind = np.empty_like(stage)
        at_hosts, at_inside = stage[:, :, self.positions.hosts], stage[:, :, self.positions.inside]
        for sender in range(len(self.submeshes)):
            best = np.full((stage.shape[1], len(self.positions.hosts) + 1), math.inf)
            best[:, :-1] = (self.trips_between[sender][:, :, None] + at_hosts).min(axis=0)
            best = np.minimum.accumulate(best[:, ::-1], axis=1)[:, ::-1]  # hosts between stay idle
            behind[sender] = best[:, self.positions.next_host]
            if at_inside.size and np.isfinite(self.trips_inside[sender]).any():
                nearer = (self.trips_inside[sender][:, :, None] + at_inside).min(axis=0)
                inside = self.positions.inside
                behind[sender][:, inside] = np.minimum(behind[sender][:, inside], nearer)
        return behind

    def costs(self, left: int, number: int) -> list[tuple[int, Floats]]:
        """The seconds of the first of so many stages on a submesh, as `StageTables.by_length` has them."""
        if (left, number) not in self._costs:
            self._costs[left, number] = self.tables.by_length(left, self.submeshes[number], self.limits)
        return self._costs[left, number]

    def beginnings(self, left: int) -> Iterator[tuple[float, int, int]]:
        """Of pipelines of so many stages: the least sum, and the submesh and position of their first stage."""
        for position in self.positions.hosts.tolist():
            for number in range(len(self.submeshes)):
                yield float(self.stages[left - 1][number, 0, position]), number, position

    def followers(self, left: int, sender: int, first: int, position: int) -> Iterator[tuple[float, float, int, int]]:
        """The stages that may be the first of ``left`` behind a sender.

        Args:
            left: stages, from the one that is asked for on.
            sender: the submesh before.
            first: the first layer.
            position: behind the sender.

        Yields:
            The least sum from there on, the seconds of the round trip before, the submesh, and where it begins.
        """
        stage = self.stages[left - 1][:, first]
        if position in self.positions.inside:
            for number in np.flatnonzero(
                np.isfinite(stage[:, position] + self.trips_inside[sender, :, first])
            ).tolist():
                yield float(stage[number, position]), float(self.trips_inside[sender, number, first]), number, position
        hosts = self.positions.hosts[self.positions.next_host[position] :]
        for number, host in np.argwhere(np.isfinite(stage[:, hosts])).tolist():
            trip = float(self.trips_between[sender, number, first])
            yield float(stage[number, hosts[host]]), trip, number, int(hosts[host])

    def places(self, num_stages: int) -> tuple[Place, ...]:
        """The stages of the least sum for so many of them."""
        _, number, position = min(self.beginnings(num_stages))
        first, found = 0, list[Place]()
        for left in range(num_stages, 0, -1):
            behind = self.behind(number, position)
            choices = list[tuple[float, int, int, int]]()
            for num_layers, costs in self.costs(left, number):
                end = first + num_layers
                if end <= self.tables.problem.num_layers and math.isfinite(costs[first]):
                    following = (
                        [
                            (least + trip, other, place)
                            for least, trip, other, place in self.followers(left - 1, number, end, behind)
                        ]
                        if left > 1
                        else [(0.0, 0, 0)] * (end == self.tables.problem.num_layers)
                    )
                    choices += [(float(costs[first]) + rest, end, other, place) for rest, other, place in following]
            _, end, other, place = min(choices)
            found.append(self.place(number, first, end, position))
            first, number, position = end, other, place
        return tuple(found)

    def place(self, number: int, first: int, end: int, position: int) -> Place:
        """A stage in devices of the line."""
        return Place(first, end, self.submeshes[number], position * self.positions.unit)

    def behind(self, number: int, position: int) -> int:
        """The position behind a submesh."""
        return position + self.submeshes[number].num_devices // self.positions.unit
