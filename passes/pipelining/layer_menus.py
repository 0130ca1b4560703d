"""The options of each kind of layer on a mesh, from solved networks: a few points of its trade of time against memory.

Memory is a price in the networks. The prices are those at which the choice changes: between two choices, the price at which
both cost the same is tried next, and either gives a new choice or proves that there is none between (Eisner and Severance,
"Mathematical techniques for efficient record segmentation in large shared databases", JACM 1976). So the choices are the
lower hull of seconds over bytes, from the fastest to the leanest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bactrian.passes.frame.processes import Workers
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.spec import MeshAxes, Spec, num_devices
from bactrian.passes.network.solver import solve
from bactrian.passes.pipelining.layer_networks import BorderClass, LayerNetwork, LayerUsage
from bactrian.passes.pipelining.layer_options import LayerOption, Menu
from bactrian.passes.pipelining.layers import ProgramLayers

_IN_FLIGHT = 4  # microbatches, as far as prices go: what is kept counts so many times what is there once
_LEAST_PRICE = 1e-3  # of a byte, as a part of the price at which all memory costs as much as the work
_MOST_PRICE = 4.0
_MOST_CHOICES = 5  # of one mesh
_LEAST_LOSS = 2e-3  # of the seconds of a step: choices that differ by less have none between them
_SLACK = 1.25  # devices times seconds of a mesh, as a multiple of those of a better one, from which it is left out
_TOLERANCE = 1e-3  # of a choice's cost: the prices that memory has otherwise are farther apart
_TIME_LIMIT = 60.0  # seconds of one network, which takes half a second: it ends what never would


@dataclass(frozen=True)
class SizedLayers:
    """The layers of a program for one size of microbatch, and how many of these a step has."""

    layers: ProgramLayers
    microbatches: int


@dataclass(frozen=True)
class _Solved:
    """A choice for one layer: what it takes, and how it shards its borders."""

    usage: LayerUsage
    borders: dict[BorderClass, Spec]
    choice: tuple[int, ...]
    microbatches: int

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.microbatches * (self.usage.forward + self.usage.backward) + self.usage.once

    @property
    def nbytes(self) -> float:
        """As prices count them."""
        return self.usage.static + _IN_FLIGHT * self.usage.kept


@dataclass(frozen=True)
class _Task:
    """A mesh for one size of microbatch; the fastest choice for the layer that takes most of a step, once it is known."""

    sized: SizedLayers
    hosts: HostGroup
    axes: MeshAxes
    fastest: _Solved | None = None

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return num_devices(self.axes)

    def network(self, kind: int) -> LayerNetwork:
        """Of a kind of layer."""
        return LayerNetwork(self.sized.layers.kinds[kind], self.hosts.mesh(self.axes), self.sized.microbatches)

    @property
    def unit_price(self) -> float:
        """Seconds per byte at which a device's memory costs as much as the work of the first layer in a step."""
        first = self.sized.layers.kinds[_order(self.sized.layers)[0]]
        return first.seconds * self.sized.microbatches / self.devices / self.hosts.memory_bytes


def mesh_shapes(hosts: HostGroup) -> tuple[MeshAxes, ...]:
    """The meshes of two axes that stages may have: part of a host, or whole hosts.

    Inside a host the axes are alike, so the first is not the larger one; between hosts the first axis is the one that
    leaves them.
    """
    per_host, found = hosts.devices_per_host, list[MeshAxes]()
    for count in range(1, hosts.num_devices + 1):
        if count > per_host and count % per_host:
            continue
        for inner in range(1, count + 1):
            outer = count // inner
            if count % inner == 0 and (outer <= inner if count <= per_host else per_host % inner == 0):
                found.append((("data", outer), ("model", inner)))
    return tuple(found)


def menus(
    sizes: Sequence[SizedLayers], hosts: HostGroup, meshes: Sequence[MeshAxes], num_workers: int = 1
) -> list[tuple[Menu, ...]]:
    """The options of all kinds of layers on meshes, for several sizes of microbatch.

    A mesh is left out where a smaller one, or another of as many devices, does the same work with far fewer devices times
    seconds, fits into memory, and is not too small for all layers to have a place; and with it those that are made
    larger along its first axis.

    Args:
        sizes: the same layers at one size or more.
        hosts: whose devices the meshes are made of.
        meshes: in any order.
        num_workers: processes; the result is the same for any number.

    Returns:
        For each size the menus of the meshes that are left, in the order of ``meshes``.
    """
    with Workers(num_workers) as workers:
        tasks = [task for sized in sizes for task in _worthwhile(sized, hosts, meshes, workers)]
        heavy = sorted(range(len(tasks)), key=lambda number: -tasks[number].devices)
        made = dict(zip(heavy, workers.map(_menu, [tasks[number] for number in heavy]), strict=True))
    found = {(id(task.sized), task.axes): made[number] for number, task in enumerate(tasks)}
    return [tuple(found[id(sized), axes] for axes in meshes if (id(sized), axes) in found) for sized in sizes]


def _worthwhile(sized: SizedLayers, hosts: HostGroup, meshes: Sequence[MeshAxes], workers: Workers) -> list[_Task]:
    """The meshes that no other makes useless, with their fastest choices."""
    least = hosts.num_devices / sized.layers.num_layers
    left, useless = list[_Task](), set[MeshAxes]()
    rounds = [[axes for axes in meshes if num_devices(axes) <= hosts.devices_per_host]]
    larger = sorted({num_devices(axes) for axes in meshes if num_devices(axes) > hosts.devices_per_host})
    rounds += [[axes for axes in meshes if num_devices(axes) == count] for count in larger]
    for each in rounds:
        asked = [_Task(sized, hosts, axes) for axes in each if useless.isdisjoint(_smaller(axes, meshes))]
        useless |= {axes for axes in each if not useless.isdisjoint(_smaller(axes, meshes))}
        left += [replace(task, fastest=found) for task, found in zip(asked, workers.map(_fastest, asked), strict=True)]
        better = [task for task in left if task.devices >= least and _fits(task)]
        for task in left:
            limit = task.devices * _seconds(task) / _SLACK
            if any(one.devices <= task.devices and one.devices * _seconds(one) < limit for one in better):
                useless.add(task.axes)
        left = [task for task in left if task.axes not in useless]
    return left


def _smaller(axes: MeshAxes, meshes: Sequence[MeshAxes]) -> list[MeshAxes]:
    """The meshes that differ from this one in a smaller first axis."""
    return [other for other in meshes if other[1:] == axes[1:] and other[0][1] < axes[0][1]]


def _fits(task: _Task) -> bool:
    """Whether the first layer fits into memory, with one microbatch in flight."""
    assert task.fastest is not None
    usage = task.fastest.usage
    return usage.static + usage.kept + usage.working <= task.hosts.memory_bytes


def _seconds(task: _Task) -> float:
    assert task.fastest is not None
    return task.fastest.seconds


def _fastest(task: _Task) -> _Solved:
    """The fastest choice for the first layer: the fastest but for a small price of memory."""
    return _solved(task.network(_order(task.sized.layers)[0]), _LEAST_PRICE * task.unit_price, {})


def _menu(task: _Task) -> Menu:
    """The options of every kind of layer on one mesh."""
    order = _order(task.sized.layers)
    networks = {kind: task.network(kind) for kind in order}
    options: list[dict[LayerOption, None]] = [{} for _ in order]
    for price, first in _hull(networks[order[0]], task):
        given = dict(first.borders)
        options[order[0]] |= dict.fromkeys(_options(first.usage))
        for kind in order[1:]:
            solved = _solved(networks[kind], price, given)
            given = {**solved.borders, **given}
            options[kind] |= dict.fromkeys(_options(solved.usage))
    return Menu(task.axes, tuple(tuple(each) for each in options))


def _order(layers: ProgramLayers) -> list[int]:
    """The kinds in the order in which they are solved: those that take most of a step first, for the others to fit them."""
    count = Counter(layers.kind_of)
    return sorted(range(len(layers.kinds)), key=lambda kind: -count[kind] * layers.kinds[kind].seconds)


def _solved(network: LayerNetwork, price: float, given: dict[BorderClass, Spec]) -> _Solved:
    choice = solve(network.priced(price, _IN_FLIGHT, given), _TIME_LIMIT, _TOLERANCE).choice
    return _Solved(network.usage(choice), network.border_specs(choice), choice, network.microbatches)


def _hull(network: LayerNetwork, task: _Task) -> Iterator[tuple[float, _Solved]]:
    """Prices and the choices at them, from the fastest to the leanest."""
    assert task.fastest is not None
    low, high = _LEAST_PRICE * task.unit_price, _MOST_PRICE * task.unit_price
    found = {low: task.fastest, high: _solved(network, high, {})}
    gaps = [(low, high)]
    while gaps and len(found) < _MOST_CHOICES:
        left, right = gaps.pop(0)
        saved = found[left].nbytes - found[right].nbytes
        lost = found[right].seconds - found[left].seconds
        if saved <= 0 or lost <= _LEAST_LOSS * found[left].seconds:
            continue
        price = lost / saved
        middle = _solved(network, price, {})
        if middle.choice not in (found[left].choice, found[right].choice):
            found[price] = middle
            gaps += [(left, price), (price, right)]
    return iter(sorted({solved.choice: (price, solved) for price, solved in found.items()}.values(), key=_price))


def _price(entry: tuple[float, _Solved]) -> float:
    return entry[0]


def _options(usage: LayerUsage) -> Iterator[LayerOption]:
    """The options of a choice: what the backward phase computes again, it computes with the same shardings."""
    option = LayerOption(usage.forward, usage.backward, usage.once, usage.static, usage.kept, usage.working)
    yield option
    for remat, seconds, kept in (
        ("products", usage.cheap_forward, usage.kept_inputs + usage.products),
        ("all", usage.forward, usage.kept_inputs),
    ):
        if kept < usage.kept:
            yield replace(
                option,
                backward_seconds=usage.backward + seconds,
                kept_bytes=kept,
                working_bytes=usage.working + usage.kept - kept,
                remat=remat,
            )
