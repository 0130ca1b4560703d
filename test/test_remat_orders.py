"""Layers that are computed again, in random programs: the same numbers, what may be kept, and an order that is possible."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from jaxlib.mlir import ir
from staged_evaluator import run_block

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import BACKWARD, FORWARD
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, main_function

KIND = "tensor<4xf64>"
WORDS = ("none", "products", "all")


class Writer:
    """Writes forward ops layer by layer, derivatives of theirs among them, then gradients from the last layer on."""

    def __init__(self, seed: int) -> None:
        self.rng, self.lines = random.Random(seed), list[str]()
        self.num_layers = self.rng.randint(2, 5)
        self.words = [self.rng.choice(WORDS) for _ in range(self.num_layers)]

    def op(self, layer: int, phase: str, reads: list[str]) -> str:
        """One op on some of the values."""
        name, stage = f"%v{len(self.lines)}", layer * 2 // self.num_layers
        where = f'{{bactrian.layer = {layer} : i64, bactrian.phase = "{phase}", bactrian.stage = {stage} : i64}}'
        kind = self.rng.choice(("add", "multiply", "cosine", "subtract"))
        operands = self.rng.sample(reads, 1) if kind == "cosine" else self.rng.choices(reads, k=2)
        self.lines.append(f"{name} = stablehlo.{kind} {', '.join(operands)} {where} : {KIND}")
        return name

    def text(self) -> str:
        """The module."""
        rng, output, made, factors = self.rng, ["%x"], list[list[str]](), list[list[str]]()
        for layer in range(self.num_layers):
            own, early = list[str](), list[str]()
            for _ in range(rng.randint(2, 5)):
                own.append(self.op(layer, FORWARD, [*output[-2:], "%p", *own]))
                if rng.random() < 0.4:  # a derivative, which jax writes beside the op
                    early.append(self.op(layer, BACKWARD, own))
            output.append(own[-1])
            made.append(own)
            factors.append(early)
        gradients = list[str]()
        for layer in reversed(range(self.num_layers)):
            for _ in range(rng.randint(2, 5)):
                reads = [*made[layer], *output[: layer + 1], *factors[layer], *gradients[-4:], "%p"]
                gradients.append(self.op(layer, BACKWARD, reads))
        results = [f"%v{number}" for number in range(len(self.lines))]
        words = ", ".join(f'"{word}"' for word in self.words)
        return (
            f"module attributes {{bactrian.num_layers = {self.num_layers} : i64, bactrian.num_stages = 2 : i64, "
            f'bactrian.remat = [{words}]}} {{\nsdy.mesh @stage0 = <["data"=1]>\nsdy.mesh @stage1 = <["data"=1]>\n'
            f'func.func public @main(%x: {KIND} {{bactrian.role = "batch"}}, %p: {KIND} {{bactrian.role = "state"}}) -> '
            f"({', '.join([KIND] * len(results))}) {{\n"
            + "\n".join(self.lines)
            + f"\nreturn {', '.join(results)} : {', '.join([KIND] * len(results))}\n}}\n}}"
        )


def results_of(module: ir.Module) -> list[Any]:
    block, draw = body(main_function(module)), np.random.default_rng(0)
    return run_block(block, {argument: draw.normal(size=4) for argument in block.arguments}, None)


def mark_inner_ops(flow: MainDataflow, words: list[str]) -> None:
    """Mark the forward ops of layers that are computed again whose results no other layer reads in the forward phase."""
    layers = [ir.IntegerAttr(op.attributes["bactrian.layer"]).value for op in flow.ops[:-1]]
    forward = [index for index, phase in enumerate(flow.phases) if phase == FORWARD]
    crossing = {
        v for index in forward for v in flow.operands[index] if v > 1 and layers[flow.producer[v]] != layers[index]
    }
    for index in forward:
        if words[layers[index]] != "none" and not crossing.intersection(flow.results[index]):
            flow.ops[index].attributes["inner"] = ir.UnitAttr.get()


def kept_inner_ops(flow: MainDataflow) -> list[str]:
    """Those of them whose results the backward phase of the same stage reads (another stage is sent what it reads)."""
    return [
        str(flow.ops[producer])
        for index, phase in enumerate(flow.phases)
        if phase == BACKWARD
        for producer in (flow.producer[value] for value in flow.operands[index])
        if producer >= 0 and flow.phases[producer] == FORWARD and flow.stages[producer] == flow.stages[index]
        if "inner" in flow.ops[producer].attributes
    ]


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 10))])
def test_random_programs(block: int) -> None:
    again = 0
    for seed in range(30 * block, 30 * block + 30):
        writer = Writer(seed)
        with make_context(), ir.Location.unknown():
            module = ir.Module.parse(writer.text())
            before = results_of(module)
            run_pipeline(module, "builtin.module(clone-cheap-ops)")
            mark_inner_ops(MainDataflow.of(main_function(module)), writer.words)
            run_pipeline(module, "builtin.module(select-residuals)")
            for ours, reference in zip(results_of(module), before, strict=True):
                assert np.array_equal(ours, reference), f"seed {seed}"
            flow = MainDataflow.of(main_function(module))
            assert kept_inner_ops(flow) == [], f"seed {seed}"
            again += sum(op.name == "stablehlo.optimization_barrier" for op in flow.ops)
    assert again > 30
