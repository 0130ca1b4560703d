"""The staged module computes what the captured one computes: random small programs, both run by a numpy evaluator."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jaxlib.mlir import ir
from staged_evaluator import StagedRun, run_captured, shape_and_dtype

from bactrian.passes import pipelines
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.hoist_invariants import HoistInvariants
from bactrian.passes.infer_phases import InferPhases
from bactrian.passes.ir.attributes import argument_roles, integer, phase_of, result_updates
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, main_function

LOOPED = "bactrian.looped_microbatches"


def assign_randomly(module: ir.Module, num_stages: int, rng: random.Random) -> None:
    """Stages that respect the data flow: forward edges never go down, backward edges never up."""
    main = main_function(module)
    flow = MainDataflow.of(main)
    stages = [0] * len(flow.ops)
    for index, op in enumerate(flow.ops):
        phase = phase_of(op)
        if phase is None:
            continue
        sources = [flow.producer[v] for v in flow.operands[index] if flow.producer[v] >= 0]
        same = [stages[source] for source in sources if phase_of(flow.ops[source]) == phase]
        low = max(same, default=0) if phase == "forward" else 0
        high = min(same, default=num_stages - 1) if phase == "backward" else num_stages - 1
        stages[index] = rng.randint(low, high)
        op.attributes["bactrian.stage"] = integer(stages[index])


def check(text: str, count: int, num_stages: int, schedule: str, rng: random.Random, donate: bool = True) -> ir.Module:
    """Stage a program and compare two steps of it with the captured one; returns the staged module."""
    header = f'bactrian.num_microbatches = {count} : i64, bactrian.schedule = "{schedule}"'
    meshes = "\n".join(f'sdy.mesh @stage{stage} = <["data"=1]>' for stage in range(num_stages))
    source = f"module attributes {{{header}, bactrian.num_stages = {num_stages} : i64}} {{\n{meshes}\n{text}\n}}"
    with make_context() as context:
        captured = ir.Module.parse(source, context)
        staged = ir.Module.parse(source, context)
        run_pipeline(staged, [InferPhases()])
        if "bactrian.stage =" not in text:
            assign_randomly(staged, num_stages, rng)
        localize = [
            replace(each, overhead_bytes=0) if isinstance(each, HoistInvariants) else each  # the values are small
            for each in pipelines.localize_stages()
        ]
        run_pipeline(staged, [*localize, *pipelines.emit_stages(donate)])
        _compare(captured, staged, count, np.random.default_rng(rng.randint(0, 1 << 30)))
    return staged


def _whole(batches: list[dict[int, np.ndarray[Any, Any]]]) -> dict[int, np.ndarray[Any, Any]]:
    """What a step that loops by itself is given: all microbatches of an argument, one after another."""
    return {argument: np.concatenate([batch[argument] for batch in batches]) for argument in batches[0]}


def _compare(captured: ir.Module, staged: ir.Module, count: int, draw: np.random.Generator) -> None:
    main = main_function(captured)
    shapes = [shape_and_dtype(value)[0] for value in body(main).arguments]
    roles, updates = argument_roles(main), result_updates(main)
    state = {i: draw.normal(size=shapes[i]) for i, role in enumerate(roles) if role != "batch"}
    run = StagedRun(staged, {})
    run.pieces = {(a, s): state[a] for a, s in run.read_pieces(run.functions["main"]) if a in state}
    for _ in range(2):
        batches = [{i: draw.normal(size=shapes[i]) for i, r in enumerate(roles) if r == "batch"} for _ in range(count)]
        wanted = run_captured(captured, state, batches)
        found = run.step([_whole(batches)] if LOOPED in staged.operation.attributes else batches)
        assert sorted(found) == list(range(len(wanted)))
        for number, value in enumerate(wanted):
            for piece in found[number]:
                np.testing.assert_allclose(piece, value, rtol=1e-6, atol=1e-6)
        state |= {updated: wanted[n] for n, updated in enumerate(updates) if updated is not None}


# --- Random programs -------------------------------------------------------------------------------------------------

TYPES = ("tensor<f64>", "tensor<4xf64>", "tensor<6x8xf64>")  # the last is no small value


class Generator:
    """Writes a random program; every value is kept bounded by cosines."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self.rng, self.count = rng, count
        self.lines: list[str] = []
        self.types: dict[str, str] = {}
        self.free: set[str] = set()  # what doesn't depend on the batch
        self.below = False
        self.tied: list[str] = []  # sums that want to be gradients

    def program(self) -> str:
        """The text of ``@main``."""
        rng, header = self.rng, []
        arguments = [("state", rng.choice(TYPES)) for _ in range(rng.randint(1, 4))]
        arguments += [("constant", rng.choice(TYPES))] + [("batch", kind) for kind in rng.sample(TYPES[1:], 2)]
        for number, (role, kind) in enumerate(arguments):
            header.append(f'%a{number}: {kind} {{bactrian.role = "{role}"}}')
            self._define(f"%a{number}", kind, free=role != "batch")
        for _ in range(rng.randint(3, 14)):
            self._op()
        self._boundary()
        self.below = True
        for _ in range(rng.randint(0, 10)):
            self._op()
        results: list[str] = []
        for number, (role, kind) in enumerate(arguments):
            if role == "state":
                results.append(f"{self._pick(kind)} : {kind} {{bactrian.updates = {number} : i64}}")
        results += [f"{name} : {self.types[name]} {{}}" for name in rng.sample(self._known(), rng.randint(0, 2))]
        rng.shuffle(results)
        names = [entry.split(" : ", 1)[0] for entry in results]
        kinds = [entry.split(" : ", 1)[1] for entry in results]
        plain = ", ".join(kind.split(" {", maxsplit=1)[0] for kind in kinds)
        self.lines.append(f"return {', '.join(names)} : {plain}")
        inner = "\n  ".join(self.lines)
        return f"func.func public @main({', '.join(header)}) -> ({', '.join(kinds)}) {{\n  {inner}\n}}"

    def _define(self, name: str, kind: str, free: bool) -> str:
        self.types[name] = kind
        if free:
            self.free.add(name)
        return name

    def _known(self) -> list[str]:
        return [name for name in self.types if name in self.free or not self.below]

    def _pick(self, kind: str) -> str:
        """A value of a type, recent ones more often; a new constant where there is none."""
        found = [name for name in self._known() if self.types[name] == kind]
        if found and self.rng.random() < 0.95:
            return found[max(self.rng.randrange(len(found)), self.rng.randrange(len(found)))]
        return self._emit(f"stablehlo.constant dense<{self.rng.uniform(-1, 1):.3f}> : {kind}", kind, [])

    def _emit(self, text: str, kind: str, reads: list[str], count: int = 1, free: bool = True) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name}{f':{count}' * (count > 1)} = {text}")
        free = free and all(read in self.free for read in reads)
        if count == 1:
            return self._define(name, kind, free)
        return [self._define(f"{name}#{i}", kind, free) for i in range(count)][-1]

    def _op(self) -> None:
        kind = self.rng.choice(TYPES)
        a, b = self._pick(kind), self._pick(kind)
        which = self.rng.randrange(12)
        if which < 4:
            name = self.rng.choice(("add", "add", "subtract", "maximum"))
            value = self._emit(f"stablehlo.{name} {a}, {b} : {kind}", kind, [a, b])
            self._emit(f"stablehlo.cosine {value} : {kind}", kind, [value])
        elif which < 6:
            name = self.rng.choice(("add", "add", "multiply"))
            self._emit(f"stablehlo.{name} {a}, {b} : {kind}", kind, [a, b])
        elif which == 6:
            scalar = self._pick(TYPES[0])
            self._emit(f"stablehlo.broadcast_in_dim {scalar}, dims = [] : ({TYPES[0]}) -> {kind}", kind, [scalar])
        elif which == 7:
            self._emit(f"stablehlo.optimization_barrier {a}, {b} : {kind}, {kind}", kind, [a, b], count=2)
        elif which == 8:
            self._case(kind, a, b)
        elif which == 9:
            self._sum(kind, a)
        elif which == 10:
            self._fold()
        else:
            self._tied_sum()

    def _case(self, kind: str, a: str, b: str) -> None:
        index = "stablehlo.constant dense<1> : tensor<i32>"
        if not self.below and self.rng.random() < 0.5:
            index = "stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<i32>"
        number = f"%i{len(self.lines)}"
        self.lines.append(f"{number} = {index}")
        end = f"stablehlo.return %r : {kind}"
        regions = "}, {\n".join(f"%r = stablehlo.{op} {a}, {b} : {kind}\n {end}" for op in ("add", "minimum"))
        text = f'"stablehlo.case"({number}) ({{\n{regions}}}) : (tensor<i32>) -> {kind}'
        self._emit(text, kind, [a, b], free="constant" in index)

    def _sum(self, kind: str, a: str) -> None:
        zero = self._emit("stablehlo.constant dense<0.0> : tensor<f64>", TYPES[0], [])
        dims = {TYPES[0]: "", TYPES[1]: "0", TYPES[2]: "0, 1"}[kind]
        text = f"stablehlo.reduce({a} init: {zero}) applies stablehlo.add across dimensions = [{dims}]"
        total = self._emit(f"{text} : ({kind}, {TYPES[0]}) -> {TYPES[0]}", TYPES[0], [a])
        self._emit(f"stablehlo.cosine {total} : {TYPES[0]}", TYPES[0], [total])

    def _fold(self) -> None:
        """``reduce(concatenate(scalars))``, as ``jnp.max(jnp.array([...]), initial=...)`` lowers to."""
        row, reads = "tensor<1xf64>", [self._pick(TYPES[0]) for _ in range(self.rng.randint(2, 4))]
        rows = [self._emit(f"stablehlo.reshape {a} : ({TYPES[0]}) -> {row}", row, [a]) for a in reads]
        whole = f"tensor<{len(rows)}xf64>"
        text = f"stablehlo.concatenate {', '.join(rows)}, dim = 0 : ({', '.join([row] * len(rows))}) -> {whole}"
        joined = self._emit(text, whole, rows)
        init = self._emit(f"stablehlo.constant dense<{self.rng.choice((0.0, 1.0, 0.5))}> : {TYPES[0]}", TYPES[0], [])
        kind = self.rng.choice(("add", "multiply", "maximum", "minimum"))
        text = f"stablehlo.reduce({joined} init: {init}) applies stablehlo.{kind} across dimensions = [0]"
        self._emit(f"{text} : ({whole}, {TYPES[0]}) -> {TYPES[0]}", TYPES[0], [joined, init])

    def _tied_sum(self) -> None:
        """A sum of several values with a transpose behind it, as a tied parameter's gradient."""
        total = self._emit(f"stablehlo.cosine {(first := self._pick(TYPES[1]))} : {TYPES[1]}", TYPES[1], [first])
        for _ in range(self.rng.randint(1, 4)):
            other = self._pick(TYPES[1])
            total = self._emit(f"stablehlo.add {total}, {other} : {TYPES[1]}", TYPES[1], [total, other])
        text = f"stablehlo.transpose {total}, dims = [0] : ({TYPES[1]}) -> {TYPES[1]}"
        self.tied.append(self._emit(text, TYPES[1], [total]))

    def _boundary(self) -> None:
        names = self.rng.choices([*self.types], k=self.rng.randint(1, 5))
        names += self.tied
        kinds = [self.rng.choice(("loss", "aux", "gradient", "gradient")) for _ in names]
        hows = [self.rng.choice(("mean", "mean", "sum", "last")) for _ in names]
        types = [self.types[name] for name in names]
        results = list(types)
        for number, kind in enumerate(types):
            if kind == TYPES[1] and self.rng.random() < 0.3:
                hows[number], results[number] = "concat", f"tensor<{4 * self.count}xf64>"
        config = f'{{kinds = "{",".join(kinds)}", reductions = "{",".join(hows)}"}}'
        count = f":{len(names)}" * (len(names) > 1)
        self.lines.append(
            f"%b{count} = stablehlo.custom_call @bactrian.gradient_boundary({', '.join(names)}) "
            f"{{mhlo.backend_config = {config}}} : ({', '.join(types)}) -> ({', '.join(results)})"
        )
        for number, kind in enumerate(results):
            self._define(f"%b#{number}" if count else "%b", kind, free=True)


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(block, marks=pytest.mark.long) for block in range(2, 20))])
def test_random_programs(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        rng = random.Random(seed)
        count = rng.randint(1, 3)
        text = Generator(rng, count).program()
        try:
            check(text, count, rng.randint(1, 4), rng.choice(("gpipe", "1f1b")), rng, rng.random() < 0.7)
        except Exception as error:
            raise AssertionError(f"seed {seed}:\n{text}") from error


def test_random_programs_of_one_stage_that_loop() -> None:
    looped = 0
    for seed in range(40):
        rng = random.Random(seed)
        staged = check(Generator(rng, 2).program(), 2, 1, "1f1b", rng)
        looped += LOOPED in staged.operation.attributes
    assert looped == 20  # the others have no function that is forward and backward at once


# --- Programs written by hand: "S0" and "S1" are stages, "V" is a vector ----------------------------------------------

HEAD = (
    'func.func public @main(%p: V {bactrian.role = "state"}, %q: V {bactrian.role = "state"}, '
    '%x: V {bactrian.role = "batch"}) -> (V {bactrian.updates = 0 : i64}, V {bactrian.updates = 1 : i64}) {\n'
)
GRADIENT_BOUNDARY = "%b = stablehlo.custom_call @bactrian.gradient_boundary"
ONE = '{mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (V) -> V\n'
TWO = '{mhlo.backend_config = {kinds = "gradient,aux", reductions = "mean,last"}} : (V, V) -> (V, V)\n'
GRADIENTS = "%g = stablehlo.multiply %p, %x S0 : V\n%h = stablehlo.multiply %q, %x S1 : V\n"
BOTH = f"{GRADIENTS}{GRADIENT_BOUNDARY.replace('%b', '%b:2')}(%g, %h) {TWO}"
PROGRAMS = {
    "frozen_parameter": f"{BOTH}%n = stablehlo.subtract %p, %b#0 S0 : V\nreturn %n, %q : V, V",
    "running_mean": f"""%m = stablehlo.add %q, %x S0 : V
        %l = stablehlo.add %q, %p S1 : V
        {GRADIENT_BOUNDARY.replace("%b", "%b:2")}(%l, %m) {TWO} return %b#0, %b#1 : V, V""",
    "copied_state": f"{BOTH}%n = stablehlo.subtract %q, %b#1 S1 : V\nreturn %q, %n : V, V",
    "swapped_states": f"{BOTH}return %q, %p : V, V",
    "rotated_states": f"{BOTH}%n = stablehlo.add %p, %b#0 S1 : V\nreturn %q, %n : V, V",
    "one_value_for_two_states": f"{BOTH}%n = stablehlo.add %p, %b#0 S1 : V\nreturn %n, %n : V, V",
    "gradient_as_state": f"{BOTH}return %b#0, %b#1 : V, V",
    "repeated_operand": f"""{GRADIENTS}{GRADIENT_BOUNDARY.replace("%b", "%b:2")}(%g, %g) {TWO}
        %n = stablehlo.add %b#0, %b#1 S1 : V
        %m = stablehlo.multiply %b#0, %q S1 : V
        return %n, %m : V, V""",
    "argument_in_a_sum": f"""%y = stablehlo.cosine %q S1 : V
        %s = stablehlo.add %x, %y S1 : V
        {GRADIENT_BOUNDARY}(%s) {ONE} return %b, %q : V, V""",
    "tied_parameter": f"""{GRADIENTS}%s = stablehlo.add %g, %h S0 : V
        %t = stablehlo.transpose %s, dims = [0] S0 : (V) -> V
        {GRADIENT_BOUNDARY}(%t) {ONE} %n = stablehlo.subtract %p, %b S0 : V
        %m = stablehlo.subtract %q, %b S1 : V
        return %n, %m : V, V""",
    "index_in_a_branch": f"""%i = stablehlo.constant S0 dense<0> : tensor<i32>
        %y = "stablehlo.case"(%i) ({{
          %k = stablehlo.custom_call @bactrian.microbatch_index() S0 : () -> tensor<i32>
          %c = "stablehlo.case"(%k) ({{ stablehlo.return %p : V }}, {{ stablehlo.return %q : V }}) : (tensor<i32>) -> V
          stablehlo.return %c : V
        }}) S1 : (tensor<i32>) -> V
        {GRADIENT_BOUNDARY}(%y) {ONE} return %b, %q : V, V""",
    "clip_by_largest": f"""{BOTH}%z = stablehlo.constant S0 dense<9.0> : tensor<f64>
        %o = stablehlo.constant S0 dense<0.0> : tensor<f64>
        %n0 = stablehlo.reduce(%b#0 init: %o) applies stablehlo.add across dimensions = [0] S0
          : (V, tensor<f64>) -> tensor<f64>
        %n1 = stablehlo.reduce(%b#1 init: %o) applies stablehlo.add across dimensions = [0] S0
          : (V, tensor<f64>) -> tensor<f64>
        %r0 = stablehlo.reshape %n0 S0 : (tensor<f64>) -> tensor<1xf64>
        %r1 = stablehlo.reshape %n1 S0 : (tensor<f64>) -> tensor<1xf64>
        %c = stablehlo.concatenate %r0, %r1, dim = 0 S0 : (tensor<1xf64>, tensor<1xf64>) -> tensor<2xf64>
        %l = stablehlo.reduce(%c init: %z) applies stablehlo.maximum across dimensions = [0] S0
          : (tensor<2xf64>, tensor<f64>) -> tensor<f64>
        %f = stablehlo.broadcast_in_dim %l, dims = [] S0 : (tensor<f64>) -> V
        %u = stablehlo.divide %b#0, %f S0 : V
        %v = stablehlo.divide %b#1, %f S1 : V
        return %u, %v : V, V""",
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("count", [1, 3])
def test_program(name: str, schedule: str, count: int) -> None:
    text = f"{HEAD}{PROGRAMS[name]}\n}}"
    for stage in (0, 1):
        text = text.replace(f" S{stage} ", f" {{bactrian.stage = {stage} : i64}} ")
        text = text.replace(f" S{stage}\n", f" {{bactrian.stage = {stage} : i64}}\n")
    check(text.replace("V", "tensor<4xf64>"), count, 2, schedule, random.Random(0))
