"""The recurrence over stages, layers and places on the line of hosts, for stages within limits.

Stages stand one behind the other on the line, from the first layer to the last, so that a stage's place says whether it lies
on several hosts, of which kind these are, and over which link it talks to its neighbours. For ``q`` stages that are left,
``i`` the first layer of them, ``p`` the first device and ``n`` the submesh of the first of them::

    G[q][n][i][p] = min over j       of C[q][n][i][j] + H[q - 1][n][j][p + size of n]
    H[q][s][i][p] = min over n, p'   of G[q][n][i][p'] + X(i, s, n)       with p' = p, or at the start of a later host

``C`` are the least seconds of a microbatch of layers ``i`` to before ``j`` (`stage_tables`), ``X`` those of the round trip
from a sender ``s`` that ends before device ``p``; what lies between ``p`` and ``p'`` stays idle. Behind the last layer, ``H``
is 0. A stage that begins later within a host has no advantage.

The period (`step_time.period_seconds`) must not exceed its limit ``T``. Seen from the first of ``q`` stages, of which it is
let be ``k[q]`` microbatches in flight, the longest round trip exceeds the microbatches that may be on it times ``T`` by::

    E[q] = C + max(-T, X - (k[q] - k[q - 1]) T + E[q - 1])        must not be above 0 where k[q] < m

`Recurrence` leaves that out but for the way to the last stage, ``G[q] <= k[q] T``, so that no pipeline within the limits
takes less than it says; or, ``strict``, it keeps ``E`` beside the least ``G`` of every place, so that all it finds is within
the limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bactrian.passes.pipelining.host_line import Floats, HostLine, Integers, Submesh
from bactrian.passes.pipelining.pipeline_problem import Place
from bactrian.passes.pipelining.stage_tables import Limits, StageTables


@dataclass(frozen=True)
class _Positions:
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
    def of(cls, line: HostLine, submeshes: list[Submesh]) -> _Positions:
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
        seconds: by the number of stages, from 1 on: the least sum of seconds of a microbatch over stages and round trips.
    """

    def __init__(
        self, tables: StageTables, limits: Limits, *, strict: bool = False, allowance: float = math.inf
    ) -> None:
        """``allowance``: sums of as many seconds or more are of no interest, and left out."""
        self._tables, self._limits, self._strict, self._allowance = tables, limits, strict, allowance
        self._submeshes = [each for each in tables.submeshes if tables.is_usable(each, limits)]
        self._positions = _Positions.of(tables.problem.line, self._submeshes)
        self._trips_between, self._trips_inside = self._round_trips()
        self._stages: list[Floats] = []  # G by submesh, first layer and position, for 1, 2, ... stages
        self._behind: list[Floats] = []  # H, for 0, 1, ... stages
        self.seconds: list[float] = []
        if self._submeshes:
            self._fill()

    @property
    def least(self) -> float:
        """Of all numbers of stages; infinite where there is no pipeline within the limits."""
        return min(self.seconds, default=math.inf)

    def _round_trips(self) -> tuple[Floats, Floats]:
        """Seconds by sender, receiver and first layer of the receiver: between hosts, and within one, where it has room."""
        line = self._tables.problem.line
        nbytes = np.array([*self._tables.problem.border_bytes, 0.0])
        between = np.full((len(self._submeshes), len(self._submeshes), len(nbytes)), math.inf)
        inside = between.copy()
        for s, sender in enumerate(self._submeshes):
            for r, receiver in enumerate(self._submeshes):
                between[s, r] = line.round_trip(nbytes, sender, receiver, in_host=False)
                if all(each.num_devices < line.kinds[each.kind].num_devices for each in (sender, receiver)):
                    inside[s, r] = line.round_trip(nbytes, sender, receiver, in_host=True)
        return between, inside

    def _fill(self) -> None:
        shape = len(self._submeshes), self._tables.problem.num_layers + 1, len(self._positions.next_host)
        behind, binding = np.full(shape, math.inf), np.full(shape, -self._limits.period)
        behind[:, -1] = 0.0
        known = self._tables.problem.fixed.known_stages
        for left in range(1, self._tables.most_stages + 1):
            self._behind.append(behind)
            seconds, excess = self._stage(left, behind, binding)
            seconds[seconds + self._tables.before[:, None] >= self._allowance] = math.inf
            self._stages.append(seconds)
            whole = float(seconds[:, 0, self._positions.hosts].min())
            self.seconds.append(whole if known in (None, left) else math.inf)
            if not np.isfinite(seconds).any():
                break
            behind, binding = self._seen_from_before(left, seconds, excess)

    def _is_bound(self, left: int) -> bool:
        """Whether the first of so many stages waits for round trips."""
        in_flight = self._tables.in_flight
        return left < len(in_flight) and in_flight[left] < self._tables.problem.num_microbatches

    def _stage(self, left: int, behind: Floats, binding: Floats) -> tuple[Floats, Floats]:
        """``G`` and ``E`` for so many stages, from ``H`` and what of ``E`` binds them."""
        seconds, excess = np.full_like(behind, math.inf), np.full_like(behind, -self._limits.period)
        for number, submesh in enumerate(self._submeshes):
            starts = self._positions.starts[submesh]
            ends = starts + submesh.num_devices // self._positions.unit
            following, before = behind[number][:, ends], binding[number][:, ends]
            best, most = np.full_like(following, math.inf), np.full_like(following, -self._limits.period)
            for num_layers, costs in self._tables.by_length(left, submesh, self._limits):
                own = costs[:, None]
                over = own + before[num_layers:] if self._strict else None
                if over is not None and self._is_bound(left):
                    own = np.where(over <= 0.0, own, math.inf)
                _take(best[:-num_layers], most[:-num_layers], own + following[num_layers:], over)
            seconds[number][:, starts], excess[number][:, starts] = best, most
        if self._is_bound(left) and not self._strict:
            limit = self._tables.in_flight[left] * self._limits.period
            seconds[seconds > limit * (1 + 1e-12)] = math.inf
        return seconds, excess

    def _seen_from_before(self, left: int, seconds: Floats, excess: Floats) -> tuple[Floats, Floats]:
        """``H`` and what of ``E`` binds the stage before, from ``G`` and ``E`` of so many stages."""
        behind, binding = np.empty_like(seconds), np.empty_like(seconds)
        hosts, inside = self._positions.hosts, self._positions.inside
        next_host = self._positions.next_host
        at_hosts = seconds[:, :, hosts], excess[:, :, hosts]
        at_inside = seconds[:, :, inside], excess[:, :, inside]
        best = np.full((seconds.shape[1], len(hosts) + 1), math.inf)
        most = np.full_like(best, -self._limits.period)
        for sender in range(len(self._submeshes)):
            best[:, :-1], most[:, :-1] = self._least(left, self._trips_between[sender][:, :, None], *at_hosts)
            self._skip_hosts(best, most)
            behind[sender], binding[sender] = best[:, next_host], most[:, next_host]
            trips = self._trips_inside[sender][:, :, None]
            if len(inside) and np.isfinite(trips).any():
                nearer, binds = behind[sender][:, inside], binding[sender][:, inside]
                _take(nearer, binds, *self._least(left, trips, *at_inside))
                behind[sender][:, inside], binding[sender][:, inside] = nearer, binds
        return behind, binding

    def _least(self, left: int, trips: Floats, seconds: Floats, excess: Floats) -> tuple[Floats, Floats]:
        """The least over the receivers of ``G`` with the round trip to it, and what of its ``E`` binds the sender."""
        total, period, in_flight = trips + seconds, self._limits.period, self._tables.in_flight
        if not self._strict or not self._is_bound(left + 1):
            least = total.min(axis=0)
            return least, np.full_like(least, -period)
        receiver = total.argmin(axis=0)[None]
        bound = np.maximum(-period, trips - (in_flight[left + 1] - in_flight[left]) * period + excess)
        return np.take_along_axis(total, receiver, 0)[0], np.take_along_axis(bound, receiver, 0)[0]

    def _skip_hosts(self, best: Floats, most: Floats) -> None:
        """Let the best of a later host stand for an earlier one where that is less: the hosts between stay idle."""
        if not self._strict:
            best[:] = np.minimum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
            return
        for host in range(best.shape[1] - 2, -1, -1):
            _take(best[:, host], most[:, host], best[:, host + 1], most[:, host + 1])

    def places(self, num_stages: int) -> tuple[Place, ...]:
        """The stages of the least sum for so many of them."""
        unit, found = self._positions.unit, list[Place]()
        first, position, sender = 0, 0, -1
        for left in range(num_stages, 0, -1):
            sender, position = self._next_place(left, first, position, sender)
            submesh, end = self._submeshes[sender], position + self._submeshes[sender].num_devices // unit
            totals = [
                (float(costs[first] + self._behind[left - 1][sender, first + num_layers, end]), first + num_layers)
                for num_layers, costs in self._tables.by_length(left, submesh, self._limits)
                if first < len(costs)
            ]
            following = min(totals)[1]
            found.append(Place(first, following, submesh, position * unit))
            first, position = following, end
        return tuple(found)

    def _next_place(self, left: int, first: int, position: int, sender: int) -> tuple[int, int]:
        """Submesh and position of the first of so many stages, behind a sender, or at any host if there is none before."""
        places, seconds = self._positions, self._stages[left - 1][:, first]
        hosts = places.hosts[places.next_host[position] :]
        totals = seconds[:, hosts]
        if sender >= 0:
            totals = totals + self._trips_between[sender, :, first, None]
            if position not in places.hosts and position < places.next_host.size - 1:
                inside = seconds[:, position] + self._trips_inside[sender, :, first]
                if not totals.size or inside.min() < totals.min():
                    return int(inside.argmin()), position
        number, host = np.unravel_index(totals.argmin(), totals.shape)
        return int(number), int(hosts[host])


def _take(best: Floats, most: Floats, seconds: Floats, excess: Floats | None) -> None:
    """Put what is less into ``best``, and what stands beside it into ``most``, in place."""
    if excess is not None:
        np.copyto(most, excess, where=seconds < best)
    np.minimum(best, seconds, out=best)
