"""``select-residuals``: what it keeps costs what the best of all choices costs."""

from __future__ import annotations

import itertools
import random

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import BACKWARD, FORWARD, phase_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function

OVERHEAD = 48
_BYTES = {"f64": 8, "f32": 4, "f16": 2}
_PRICES = {"stablehlo.tanh": 16, "stablehlo.dot": None}  # eighths of a byte per byte; None: can't be computed again


def _program(seed: int) -> str:
    """Up to nine forward ops on tensors of several widths, then backward ops that read some of what they made."""
    rng = random.Random(seed)
    kinds = {"%x": "f32", "%w": "f32"}
    lines: list[str] = []

    def emit(name: str, phase: str, choices: list[str]) -> None:
        read = rng.choice(choices)
        kind = kinds[read]
        op = rng.choice(["tanh", "negate", "add", "convert", "dot", "add", "negate"])
        other = rng.choice([value for value in choices if kinds[value] == kind])
        type_, result = (
            f"tensor<4x4x{kind}>",
            rng.choice([k for k in _BYTES if k != kind] if op == "convert" else [kind]),
        )
        words = f'{{bactrian.phase = "{phase}", bactrian.stage = 0 : i64, made = "{phase}"}}'
        if op in ("add", "dot"):
            lines.append(f"{name} = stablehlo.{op} {read}, {other} {words} : ({type_}, {type_}) -> {type_}")
        else:
            lines.append(f"{name} = stablehlo.{op} {read} {words} : ({type_}) -> tensor<4x4x{result}>")
        kinds[name] = result

    forward = ["%x", "%w"]
    for i in range(rng.randint(3, 9)):
        emit(f"%f{i}", FORWARD, forward)
        forward.append(f"%f{i}")
    backward: list[str] = []
    for i in range(rng.randint(1, 4)):
        emit(f"%b{i}", BACKWARD, forward)
        backward.append(f"%b{i}")
    results = [forward[-1], *backward]
    types = ", ".join(f"tensor<4x4x{kinds[value]}>" for value in results)
    return (
        'module attributes {bactrian.num_stages = 1 : i64} {\nsdy.mesh @stage0 = <["data"=1]>\n'
        'func.func public @main(%x: tensor<4x4xf32> {bactrian.role = "batch"}, '
        f'%w: tensor<4x4xf32> {{bactrian.role = "state"}}) -> ({types}) {{\n'
        + "\n".join(lines)
        + f"\nreturn {', '.join(results)} : {types}\n}}\n}}"
    )


def _again(flow: MainDataflow, value: int, heavy: set[int]) -> int | None:
    """The price of computing a value again."""
    op = flow.ops[flow.producer[value]]
    price = _PRICES.get(op.name, 1)
    return None if price is None else flow.sizes[value] * (price + 8 * (value in heavy))


def _best(flow: MainDataflow) -> int:
    """The least price over all sets of kept values."""
    phases = [phase_of(op) for op in flow.ops]
    readers = [i for i, phase in enumerate(phases) if phase == BACKWARD]
    heavy = {v for i in readers for v in flow.operands[i] if flow.ops[i].name == "stablehlo.dot"}
    values = [0, *(v for i, phase in enumerate(phases) if phase == FORWARD for v in flow.results[i])]  # 1 is the state
    best = None
    for kept in itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(len(values) + 1)):
        price, done = 8 * sum(flow.sizes[v] + OVERHEAD for v in kept), set(kept) | {1}
        stack = [v for i in readers for v in flow.operands[i]]
        while stack and price is not None:
            value = stack.pop()
            if value in done or phases[flow.producer[value]] == BACKWARD:
                continue
            done.add(value)
            more = _again(flow, value, heavy) if value else None
            price = None if more is None else price + more
            stack += flow.operands[flow.producer[value]] if value else ()
        if price is not None and (best is None or price < best):
            best = price
    assert best is not None
    return best


def _paid(flow: MainDataflow) -> int:
    """The price of what the pass made; ops that it moved or cloned are of the backward phase, but made forward."""
    phases = [phase_of(op) for op in flow.ops]
    readers = [i for i, phase in enumerate(phases) if phase == BACKWARD]
    made = [
        ir.StringAttr(flow.ops[i].attributes["made"]).value if i < len(flow.ops) - 1 else "" for i in range(len(phases))
    ]
    heavy = {v for i in readers if made[i] == BACKWARD for v in flow.operands[i] if flow.ops[i].name == "stablehlo.dot"}
    kept = {v for i in readers for v in flow.operands[i] if v != 1 and (v == 0 or phases[flow.producer[v]] == FORWARD)}
    price = 8 * sum(flow.sizes[v] + OVERHEAD for v in kept)
    for i in readers:
        if made[i] == FORWARD:
            more = _again(flow, flow.results[i][0], heavy)
            assert more is not None
            price += more
    return price


@pytest.mark.parametrize("seed", range(200))
def test_no_choice_is_cheaper(seed: int) -> None:
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse(_program(seed))
        best = _best(MainDataflow.of(main_function(module)))
        run_pipeline(module, f"builtin.module(select-residuals{{overhead-bytes={OVERHEAD}}})")
        assert _paid(MainDataflow.of(main_function(module))) == best
