"""Random ops × all shardings that may be chosen for them, compared with one device.

Many ops go into one module, since a module's compilation takes longer than its run: each op once per strategy, its
operands resharded from a random spec, its results to one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir
from op_cases import Array, Case, Generator, Type, one_device_module

from bactrian.driver.xla.compile_stage import compile_functions, signature_shardings
from bactrian.passes.frame.context import make_context
from bactrian.passes.ir.op_costs import tensor_size
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.spec import MeshAxes, Spec, num_devices
from bactrian.passes.sharding.strategies import Defers, Strategy, strategies
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes
from bactrian.passes.spmd.function_partitioner import FORWARDING, partition_function
from bactrian.passes.spmd.op_rules import annotate_rules, rule_of
from bactrian.passes.spmd.reshard_paths import all_specs
from bactrian.passes.spmd.sharding_rules import Rule, replicated_rule

MESHES: tuple[MeshAxes, ...] = (
    (("x", 2),),
    (("x", 2), ("y", 2)),
    (("x", 3),),
    (("x", 4),),
    (("x", 2), ("y", 3)),
    (("x", 6),),
    (("x", 2), ("y", 4)),
    (("x", 2), ("y", 2), ("z", 2)),
    (("x", 4), ("y", 2)),
    (("x", 8),),
)


@dataclass(frozen=True)
class Cut:
    """One op under one strategy.

    Attributes:
        case: the number of the op in its bundle.
        arguments: how its operands arrive; they are resharded to what the strategy reads.
        strategy: what is chosen.
        targets: to what its results are resharded.
    """

    case: int
    arguments: tuple[Spec, ...]
    strategy: Strategy
    targets: tuple[Spec, ...]


@dataclass
class Bundle:
    """Ops, the mesh, and strategies of each."""

    seed: int
    axes: MeshAxes
    cases: list[Case]
    cuts: list[Cut] = field(default_factory=list["Cut"])

    def only(self, cut: Cut) -> Bundle:
        """A bundle of one."""
        return Bundle(self.seed, self.axes, [self.cases[cut.case]], [dataclasses.replace(cut, case=0)])

    def text(self) -> str:
        """The module with ``sdy.sharding`` and ``sdy.reshard``, before it is partitioned."""
        sizes = ", ".join(f'"{name}"={size}' for name, size in self.axes)
        lines, arguments, results, types = list[str](), list[str](), list[str](), list[str]()
        for number, cut in enumerate(self.cuts):
            case = self.cases[cut.case]
            read = list[str]()
            for at, (type_, spec, wanted) in enumerate(
                zip(case.reads, cut.arguments, cut.strategy.operands, strict=True)
            ):
                name = f"%a{number}_{at}"
                arguments.append(f"{name}: {type_} {{sdy.sharding = {_sharding(spec)}}}")
                read.append(_reshard(lines, name, f"%b{number}_{at}", spec, wanted, type_))
            made = ", ".join(bare(spec) for spec in cut.strategy.partial)
            lines.append(case.line(f"%r{number}", read, f"sdy.sharding = #sdy.sharding_per_value<[{made}]>"))
            for at, (name, type_) in enumerate(zip(case.names(f"%r{number}"), case.results, strict=True)):
                partial, result, target = cut.strategy.partial[at], cut.strategy.results[at], cut.targets[at]
                name = _reshard(lines, name, f"%s{number}_{at}", partial, result, type_)
                results.append(_reshard(lines, name, f"%t{number}_{at}", result, target, type_))
                types.append(f"{type_} {{sdy.sharding = {_sharding(target)}}}")
        plain = ", ".join(type_.partition(" {")[0] for type_ in types)
        inside = "\n  ".join(lines)
        return (
            f"module @ops {{\nsdy.mesh @stage0 = <[{sizes}]>\nfunc.func @main({', '.join(arguments)}) -> ({', '.join(types)}) {{\n"
            f"  {inside}\n  return {', '.join(results)} : {plain}\n}}\n}}\n"
        )


def bare(spec: Spec) -> str:
    """The text of a sharding, without its dialect."""

    def names(axes: Sequence[str]) -> str:
        return "{" + ", ".join(f'"{axis}"' for axis in axes) + "}"

    unreduced = f", unreduced={names(spec.unreduced)}" if spec.unreduced else ""
    return f"<@stage0, [{', '.join(map(names, spec.dims))}]{unreduced}>"


def _sharding(spec: Spec) -> str:
    return f"#sdy.sharding{bare(spec)}"


def _reshard(lines: list[str], name: str, made: str, source: Spec, target: Spec, type_: Type) -> str:
    """Write a reshard where there is one to do; the name of what comes of it."""
    if source == target:
        return name
    lines.append(f"{made} = sdy.reshard {name} {bare(target)} : {type_}")
    return made


def mesh_of(axes: MeshAxes) -> Mesh:
    """A mesh with links that all cost the same."""
    return Mesh(tuple(Axis(name, size) for name, size in axes))


def bundle(seed: int, axes: MeshAxes, generators: Sequence[Generator], most: int) -> Bundle:
    """One case of each generator, with at most ``most`` strategies of each, drawn at random."""
    random = np.random.default_rng(seed)
    made = Bundle(seed, axes, [generator(random) for generator in generators])
    mesh = mesh_of(axes)
    with make_context():
        module = ir.Module.parse(one_device_module(made.cases))
        annotate_rules(module)
        operations = [view.operation for view in body(main_function(module)).operations][:-1]
        for number, (case, op) in enumerate(zip(made.cases, operations, strict=True)):
            choices = choices_of(case, op, mesh)
            picked = range(len(choices))
            if len(choices) > most:
                picked = sorted(int(each) for each in random.permutation(len(choices))[:most])
            for each in picked:
                strategy = choices[each]
                arguments = tuple(_any_spec(random, type_, mesh) for type_ in case.reads)
                targets = tuple(_any_spec(random, type_, mesh) for type_ in case.results)
                made.cuts.append(Cut(number, arguments, strategy, targets))
    return made


def choices_of(case: Case, op: ir.Operation, mesh: Mesh) -> tuple[Strategy, ...]:
    """What the solver may choose for an op with a rule."""
    rule = forwarding_rule(case) if op.name in FORWARDING else rule_of(op)
    if rule is None:  # all of it is whole
        rule = replicated_rule(tuple(each.shape for each in case.reads), tuple(each.shape for each in case.results))
    sizes = tuple(float(tensor_size(value.type).bytes) for value in op.results)
    shapes = tuple(value_shape(value) for value in op.results)
    found = strategies(rule, sizes, mesh, shapes, Defers.STARTS if case.unreduced else Defers.NOT)
    rest = tuple(Spec.replicated(len(each.shape)) for each in case.reads[len(rule.operands) :])
    return tuple(dataclasses.replace(each, operands=(*each.operands, *rest)) for each in found)


def forwarding_rule(case: Case) -> Rule:
    """Every result as its operand, each sharded on its own."""
    whole = replicated_rule(tuple(each.shape for each in case.reads), ())
    empty = frozenset(factor for factor, size in enumerate(whole.sizes) if size == 0)
    return dataclasses.replace(whole, results=whole.operands, replicated=empty)


def _any_spec(random: np.random.Generator, type_: Type, mesh: Mesh) -> Spec:
    specs = all_specs(type_.shape, mesh)
    return specs[int(random.integers(len(specs)))]


def expected(cases: Sequence[Case]) -> list[list[Array]]:
    """What one device makes of each case."""
    text = one_device_module(cases)
    device = jax.devices()[0]
    function = compile_functions({"main": text}, {"main": [device]})["main"]
    made = function([jax.device_put(value, device) for case in cases for value in case.operands])
    rest = iter(np.asarray(value) for value in made)
    return [list(itertools.islice(rest, len(case.results))) for case in cases]


def partitioned(made: Bundle) -> ir.Module:
    """The program of one device. A context has to be entered."""
    module = ir.Module.parse(made.text())
    annotate_rules(module)
    partition_function(main_function(module), "stage0", made.axes)
    return module


def bytes_of_ops(made: Bundle) -> tuple[dict[str, float], dict[str, float]]:
    """What devices send for the ops of a bundle by kind of collective: predicted, and in the module; reshards before and
    after are left out."""
    cuts = [
        dataclasses.replace(cut, arguments=cut.strategy.operands, targets=cut.strategy.results) for cut in made.cuts
    ]
    predicted = dict[str, float]()
    for cut in cuts:
        for kind, nbytes in [(each.kind, each.nbytes) for each in cut.strategy.reductions] + [
            (each.kind, each.send.nbytes) for each in cut.strategy.exchanges
        ]:
            predicted[kind] = predicted.get(kind, 0.0) + nbytes
    with make_context():
        module = partitioned(dataclasses.replace(made, cuts=cuts))
        return predicted, sent_bytes(count_collectives(module.operation))


def shards_made(made: Bundle) -> list[list[list[tuple[Any, Array]]]]:
    """Of every cut and each of its results what every device has: where it is in the whole, and the shard."""
    devices = jax.devices()[: num_devices(made.axes)]
    with make_context():
        module = partitioned(made)
        i32 = ir.IntegerType.get_signless(32)
        root = module.operation.attributes
        root["mhlo.num_partitions"], root["mhlo.num_replicas"] = (
            ir.IntegerAttr.get(i32, count) for count in (len(devices), 1)
        )
        text = str(module)
    function = compile_functions({"main": text}, {"main": devices})["main"]
    places, _ = signature_shardings(text, devices)
    operands = [value for cut in made.cuts for value in made.cases[cut.case].operands]
    results = function(jax.device_put(operands, places))
    rest = iter([[(shard.index, np.asarray(shard.data)) for shard in value.addressable_shards] for value in results])
    return [list(itertools.islice(rest, len(made.cases[cut.case].results))) for cut in made.cuts]


def difference(case: Case, wanted: Array, index: Any, shard: Array) -> str:
    """How a shard differs from the same part of the whole; empty where it doesn't."""
    part = wanted[index]
    if part.shape != shard.shape or part.dtype != shard.dtype:
        return f"{shard.dtype}{shard.shape} instead of {part.dtype}{part.shape}"
    if same_bits(part, shard) or (case.adds and np.array_equal(part, shard, equal_nan=True)):
        return ""  # XLA's all-reduces on CPUs make 0.0 of the sum of -0.0 and -0.0
    if case.tolerance:
        wide = np.complex128 if part.dtype.kind == "c" else np.float64
        one, other = part.astype(wide), shard.astype(wide)
        # Beyond the largest number of a type, one more rounding decides between it and infinity.
        scale = max(1.0, float(np.abs(one[np.isfinite(one)]).max(initial=0)))
        if np.allclose(other, one, rtol=case.tolerance, atol=case.tolerance * scale, equal_nan=True):
            return ""
    return f"at {index} it is\n{shard}\ninstead of\n{part}"


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays are equal, signs of zeros included; NaN is NaN."""
    if one.dtype.kind == "c":
        return same_bits(np.real(one), np.real(other)) and same_bits(np.imag(one), np.imag(other))
    if one.dtype.kind in "biu":
        return bool(np.array_equal(one, other))
    both = np.isnan(one) & np.isnan(other)
    bits = f"u{one.dtype.itemsize}"
    equal = np.ascontiguousarray(one).view(bits) == np.ascontiguousarray(other).view(bits)
    return bool(np.all(both | equal))


@dataclass(frozen=True)
class Wrong:
    """A cut that gave something else than one device, or nothing."""

    made: Bundle
    cut: Cut
    message: str

    def __str__(self) -> str:
        case = self.made.cases[self.cut.case]
        return f"{case.name}, seed {self.made.seed}: {self.message}\n{self.made.only(self.cut).text()}"


def check(made: Bundle) -> Iterator[Wrong]:
    """The cuts of a bundle that are wrong."""
    wanted = expected(made.cases)
    try:
        shards = shards_made(made)
    except Exception as error:
        if len(made.cuts) == 1:
            yield Wrong(made, made.cuts[0], f"{type(error).__name__}: {error}")
            return
        half = len(made.cuts) // 2
        for cuts in (made.cuts[:half], made.cuts[half:]):
            yield from check(dataclasses.replace(made, cuts=cuts))
        return
    for cut, results in zip(made.cuts, shards, strict=True):
        case = made.cases[cut.case]
        found = [
            difference(case, whole, index, shard)
            for whole, parts in zip(wanted[cut.case], results, strict=True)
            for index, shard in parts
        ]
        message = next((each for each in found if each), "")
        if message:
            yield Wrong(made, cut, message)
