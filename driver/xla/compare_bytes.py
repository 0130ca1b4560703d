"""What the compiled functions of a plan send, beside what their modules say: a check that XLA adds nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
from jaxlib.mlir import ir

from bactrian.driver.xla.compile_stage import JaxDevice, compile_function, function_texts
from bactrian.driver.xla.hlo_collectives import HloCollective, read_collectives
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.spmd.collective_bytes import Collective, count_collectives

if TYPE_CHECKING:
    from bactrian.driver.planning.staged_plan import StagedPlan

_TOLERANCE = 1e-9  # of sums of bytes


@dataclass(frozen=True)
class Difference:
    """Collectives of one kind, over groups of one size, that send something else when compiled.

    Attributes:
        kind: StableHLO's name of it.
        group: devices that take part together.
        planned, compiled: bytes that each device sends when the function runs once.
    """

    kind: str
    group: int
    planned: float
    compiled: float


@dataclass(frozen=True)
class FunctionComparison:
    """One stage function.

    Attributes:
        symbol: as ``stage0.forward``.
        runs: how often it runs in a step.
        planned, compiled: bytes that each device sends when it runs once, by kind.
        num_planned, num_compiled: collectives; XLA combines several all-reduces into one.
        differences: by kind and group.
    """

    symbol: str
    runs: int
    planned: dict[str, float]
    compiled: dict[str, float]
    num_planned: int
    num_compiled: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """All stage functions of a plan that are on a mesh of several devices."""

    functions: tuple[FunctionComparison, ...]

    @property
    def planned(self) -> dict[str, float]:
        """Bytes that the devices of all stages, one of each, send in a step by kind, as planned."""
        return _sum((function.planned, function.runs) for function in self.functions)

    @property
    def compiled(self) -> dict[str, float]:
        """The same, as compiled."""
        return _sum((function.compiled, function.runs) for function in self.functions)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Those of all functions."""
        return tuple(difference for function in self.functions for difference in function.differences)


def compare(staged: StagedPlan, devices: Sequence[JaxDevice] | None = None) -> Comparison:
    """Compile every stage function on a mesh, and compare what it sends with what is planned. Runs nothing.

    Args:
        staged: a planned program.
        devices: at least as many as the widest mesh has; each stage is compiled for the first of them. By default all
            that jax has.

    Raises:
        ConfigError: no stage has a mesh, or there are too few devices.
    """
    program = staged.program
    widest = max(program.num_devices(stage) for stage in range(program.num_stages))
    if widest == 1:
        raise ConfigError(
            "cannot compare what is sent with XLA: every stage has one device",
            fix="plan on a mesh, as in --mesh data=2,model=4",
        )
    devices = jax.devices() if devices is None else devices
    if len(devices) < widest:
        raise ConfigError(
            f"cannot compile for a mesh of {widest} devices: this process has {len(devices)}",
            why="XLA compiles for devices that are there",
            fix=f"XLA_FLAGS=--xla_force_host_platform_device_count={widest} gives virtual CPU devices, before jax starts",
        )
    found = list[FunctionComparison]()
    for symbol, text in function_texts(staged.module).items():
        stage, _, phase = symbol.removeprefix("stage").partition(".")
        count = program.num_devices(int(stage))
        if count > 1:
            hlo = compile_function(text, devices[:count]).hlo_modules()[0].to_string()
            runs = program.num_microbatches if phase.startswith(("forward", "backward")) else 1
            found.append(compare_function(symbol, runs, text, hlo))
    return Comparison(tuple(found))


def compare_function(symbol: str, runs: int, text: str, hlo: str) -> FunctionComparison:
    """Compare one function.

    Args:
        symbol, runs: of the function.
        text: its module, with the program of one device.
        hlo: what XLA has made of it, as text.
    """
    with make_context():
        planned = [each for each in count_collectives(ir.Module.parse(text).operation) if each.nbytes]
    compiled = [each for each in read_collectives(hlo) if each.nbytes]
    before = _by_group((each, each.nbytes) for each in planned)
    after = _by_group((each, each.total_bytes) for each in compiled)
    return FunctionComparison(
        symbol,
        runs,
        _sum(({kind: nbytes}, 1) for (kind, _), nbytes in before.items()),
        _sum(({kind: nbytes}, 1) for (kind, _), nbytes in after.items()),
        len(planned),
        len(compiled),
        tuple(
            Difference(*key, before.get(key, 0.0), after.get(key, 0.0))
            for key in sorted({*before, *after})
            if not math.isclose(before.get(key, 0.0), after.get(key, 0.0), rel_tol=_TOLERANCE)
        ),
    )


def _by_group(sent: Iterable[tuple[Collective | HloCollective, float]]) -> dict[tuple[str, int], float]:
    found = dict[tuple[str, int], float]()
    for collective, nbytes in sent:
        key = collective.kind, collective.group
        found[key] = found.get(key, 0.0) + nbytes
    return found


def _sum(parts: Iterable[tuple[dict[str, float], int]]) -> dict[str, float]:
    total = dict[str, float]()
    for part, times in parts:
        for name, nbytes in part.items():
            total[name] = total.get(name, 0.0) + times * nbytes
    return dict(sorted(total.items()))
