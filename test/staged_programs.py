"""Staged programs built by hand, with their stage functions, and the serial execution that everything must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from bactrian.passes.schedules.by_name import schedule_named
from bactrian.passes.schedules.schedule import Order, fused
from bactrian.runtime.staged_program import ArgumentPiece, Call, ResultPiece, StagedProgram, Transfer, Value

WIDTH, ROWS = 8, 2


@dataclass
class Builder:
    """Collects the parts of a staged program."""

    values: list[Value] = field(default_factory=lambda: [])
    calls: list[Call] = field(default_factory=lambda: [])
    transfers: list[Transfer] = field(default_factory=lambda: [])
    arguments: list[ArgumentPiece] = field(default_factory=lambda: [])
    results: list[ResultPiece] = field(default_factory=lambda: [])
    moved: dict[tuple[int, int], int] = field(default_factory=lambda: {})

    def value(self, stage: int, shape: tuple[int, ...] = (), *, each: bool = False, dtype: str = "float32") -> int:
        self.values.append(Value(len(self.values), stage, shape, dtype, each))
        return len(self.values) - 1

    def argument(self, number: int, role: str, stage: int, shape: tuple[int, ...] = ()) -> int:
        value = self.value(stage, shape, each=role == "batch")
        self.arguments.append(ArgumentPiece(number, role, value))
        return value

    def move(self, source: int, stage: int) -> int:
        """The value on another stage, transferred once."""
        old = self.values[source]
        if old.stage == stage:
            return source
        if (source, stage) not in self.moved:
            target = self.value(stage, old.shape, each=old.per_microbatch, dtype=old.dtype)
            self.transfers.append(Transfer(source, target))
            self.moved[source, stage] = target
        return self.moved[source, stage]

    def call(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], stage: int, phase: str, **more: Any
    ) -> None:
        more.setdefault("round", 0)
        self.calls.append(Call(name, stage, phase, inputs=tuple(inputs), outputs=tuple(outputs), **more))

    def program(self, schedule: str, order: tuple[tuple[str, ...], ...], num_microbatches: int) -> StagedProgram:
        parts = (self.calls, self.transfers, self.arguments, self.results)
        calls, transfers, arguments, results = map(tuple, parts)
        return StagedProgram(
            len(order), num_microbatches, schedule, tuple(self.values), calls, transfers, arguments, results, order
        )


def chain(num_stages: int, num_microbatches: int, schedule: str = "1f1b") -> StagedProgram:
    """``x -> tanh(x @ w_s + m * shared)`` per stage, a skip from stage 0 to the last, ``shared`` owned by stage 0 and
    sent to the last, a gradient accumulator per stage, a loss, and an update that needs every stage's norm.

    Arguments: 0 … S-1 the weights, S the shared state, S+1 the batch. Results alike (S+1: loss, S+2: norm, S+3: the
    old shared state as an ordinary result).
    """
    b, last, fuse_last = Builder(), num_stages - 1, "1f1b" in schedule
    weights = [b.argument(s, "state", s, (WIDTH, WIDTH)) for s in range(num_stages)]
    shared = b.argument(num_stages, "state", 0, (WIDTH,))
    x = b.argument(num_stages + 1, "batch", 0, (ROWS, WIDTH))
    zeros = [b.value(s, (WIDTH, WIDTH)) for s in range(num_stages)]
    loss_zero = b.value(last)
    for s in range(num_stages):
        b.call(f"stage{s}.initialize", (), (zeros[s], loss_zero) if s == last else (zeros[s],), s, "initialize")
    hidden, inputs, skip = x, [x], -1
    for s in range(last):
        out, residual = (b.value(s, (ROWS, WIDTH), each=True) for _ in range(2))
        b.call(f"stage{s}.forward", (weights[s], hidden, -1), (out, residual), s, "forward", index_input=2)
        inputs.append(residual)
        skip = b.move(out, last) if s == 0 else skip
        hidden = b.move(out, s + 1)
    skip = hidden if last == 0 else skip
    tail = (b.move(shared, last), skip)
    gradient = b.value(last, (ROWS, WIDTH), each=True)
    sums = [b.value(s, (WIDTH, WIDTH), each=True) for s in range(num_stages)]
    loss = b.value(last, each=True)
    if fuse_last:
        b.call(
            f"stage{last}.forward_backward",
            (weights[last], hidden, *tail, zeros[last], loss_zero),
            (gradient, sums[last], loss),
            last,
            "forward_backward",
            donated=(4, 5),
            carries=((4, 1), (5, 2)),
        )
    else:
        residual = b.value(last, (ROWS, WIDTH), each=True)
        ahead = (weights[last], hidden, *tail, loss_zero)
        carried = {"donated": (4,), "carries": ((4, 1),)}
        b.call(f"stage{last}.forward", ahead, (residual, loss), last, "forward", **carried)
        back = (weights[last], hidden, residual, zeros[last])
        carried = {"donated": (3,), "carries": ((3, 1),)}
        b.call(f"stage{last}.backward", back, (gradient, sums[last]), last, "backward", **carried)
    for s in reversed(range(last)):
        before = b.value(s, (ROWS, WIDTH), each=True)
        args = (weights[s], inputs[s] if s == 0 else b.move(out_of(b, s - 1), s), inputs[s + 1], b.move(gradient, s))
        b.call(
            f"stage{s}.backward",
            (*args, zeros[s]),
            (before, sums[s]),
            s,
            "backward",
            donated=(2, 4),
            carries=((4, 1),),
        )
        gradient = before
    norms = [b.value(s) for s in range(num_stages)]
    for s in range(num_stages):
        b.call(f"stage{s}.update", (sums[s],), (norms[s],), s, "update")
    total = -1
    for s in range(num_stages):
        new, total_here, new_shared = b.value(s, (WIDTH, WIDTH)), b.value(s), b.value(s, (WIDTH,))
        args = [weights[s], sums[s], *(b.move(n, s) for n in norms)]
        extra = {"donated": (0,)}
        outs = [new, total_here]
        if s == 0:
            args, outs = [*args, shared], [*outs, new_shared]
            b.results.append(ResultPiece(num_stages, new_shared, num_stages))
        b.call(f"stage{s}.update_1", args, outs, s, "update", round=1, **extra)
        b.results.append(ResultPiece(s, new, s))
        total = total_here if s == 0 else total
    b.results += [ResultPiece(num_stages + 1, loss), ResultPiece(num_stages + 2, total)]
    b.results.append(ResultPiece(num_stages + 3, shared))
    order = order_of(schedule, num_stages, num_microbatches, fuse_last=fuse_last)
    return b.program(schedule, order, num_microbatches)


def order_of(schedule: str, num_stages: int, num_microbatches: int, *, fuse_last: bool) -> Order:
    """The order of a schedule, with one function for the last stage's forward and backward or with two."""
    order = schedule_named(schedule).order(num_stages, num_microbatches)
    return (*order[:-1], fused(order[-1])) if fuse_last else order


def out_of(b: Builder, stage: int) -> int:
    """First output of a stage's forward."""
    return next(c.outputs[0] for c in b.calls if c.stage == stage and c.phase == "forward")


@lru_cache
def chain_functions(num_stages: int, *, donate: bool = True) -> dict[str, Callable[[list[Any]], Sequence[Any]]]:
    """The stage functions of `chain`, jitted; ``donate=False`` for the serial execution."""
    import jax
    import jax.numpy as jnp

    last = num_stages - 1

    def forward(w: Any, x: Any, m: Any) -> tuple[Any, Any]:
        y = jnp.tanh(x @ w + 0.01 * m)
        return y, 1 - y * y

    def tail_forward(w: Any, x: Any, shared: Any, skip: Any, loss: Any) -> tuple[Any, Any]:
        y = x @ w + shared + skip
        return y, loss + jnp.mean(y * y)

    def backward(w: Any, x: Any, slope: Any, g: Any, total: Any) -> tuple[Any, Any]:
        g = g * slope
        return g @ w.T, total + x.T @ g

    def tail_backward(w: Any, x: Any, y: Any, total: Any) -> tuple[Any, Any]:
        return y @ w.T, total + x.T @ y

    def both(w: Any, x: Any, shared: Any, skip: Any, total: Any, loss: Any) -> tuple[Any, Any, Any]:
        y, loss = tail_forward(w, x, shared, skip, loss)
        return (*tail_backward(w, x, y, total), loss)

    def zeros() -> tuple[Any, ...]:
        return (jnp.zeros((WIDTH, WIDTH)),)

    def zeros_and_loss() -> tuple[Any, ...]:
        return jnp.zeros((WIDTH, WIDTH)), jnp.zeros(())

    def update(w: Any, total: Any, *norms: Any) -> tuple[Any, ...]:
        norm = jnp.sqrt(sum(norms[:num_stages], jnp.zeros(())))
        new = w - 0.1 * total / norm
        return (new, norm, norms[-1] * 0.9) if len(norms) > num_stages else (new, norm)

    def jitted(function: Callable[..., Any], *donated: int) -> Callable[[list[Any]], Sequence[Any]]:
        compiled = jax.jit(function, donate_argnums=donated if donate else ())
        return lambda arrays: compiled(*arrays)

    norm = jitted(lambda total: (jnp.sum(total * total),))
    functions = {
        f"stage{last}.forward": jitted(tail_forward, 4),
        f"stage{last}.backward": jitted(tail_backward, 3),
        f"stage{last}.forward_backward": jitted(both, 4, 5),
    }
    for s in range(num_stages):
        functions[f"stage{s}.initialize"] = jitted(zeros_and_loss if s == last else zeros)
        functions[f"stage{s}.update"], functions[f"stage{s}.update_1"] = norm, jitted(update, 0)
        if s < last:
            functions[f"stage{s}.forward"], functions[f"stage{s}.backward"] = jitted(forward), jitted(backward, 2, 4)
    return functions


def chain_arguments(num_stages: int, num_microbatches: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Weights, shared state, batch."""
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH for _ in range(num_stages)]
    shared = random.normal(size=WIDTH).astype(np.float32)
    return [*weights, shared, random.normal(size=(ROWS * num_microbatches, WIDTH)).astype(np.float32)]


def run_serially(
    program: StagedProgram, functions: dict[str, Callable[[list[Any]], Sequence[Any]]], arguments: Sequence[Any]
) -> dict[tuple[int, int], Any]:
    """One microbatch after the other, in program order, on one device: (result, stage) -> array."""
    values: dict[int, Any] = {}
    sources = {t.target: t.source for t in program.transfers}

    def read(value: int) -> Any:
        while value in sources:
            value = sources[value]
        return values[value]

    def run(phases: set[str], microbatch: int) -> None:
        for piece in program.arguments:
            array = arguments[piece.argument]
            if piece.role == "batch":
                rows = len(array) // program.num_microbatches
                array = array[max(microbatch, 0) * rows : (max(microbatch, 0) + 1) * rows]
            values[piece.value] = array
        calls = [c for c in program.calls if c.phase in phases]
        for call in sorted(calls, key=lambda c: c.round):
            carried = dict(call.carries) if microbatch > 0 else {}
            inputs = [
                np.int32(microbatch) if i == call.index_input else read(call.outputs[carried[i]] if i in carried else v)
                for i, v in enumerate(call.inputs)
            ]
            values.update(zip(call.outputs, functions[call.function](inputs), strict=True))

    run({"initialize"}, -1)
    for microbatch in range(program.num_microbatches):
        run({"forward", "backward", "forward_backward"}, microbatch)
    run({"update"}, -1)
    return {(r.result, program.values[r.value].stage): np.asarray(read(r.value)) for r in program.results}


def random_program(seed: int) -> tuple[StagedProgram, tuple[int, ...]]:
    """A program without functions: random stages, microbatches, schedule, skips, owners, rounds; and ranks for it."""
    random = np.random.default_rng(seed)
    stages, microbatches = int(random.integers(1, 9)), int(random.integers(1, 9))
    schedule = str(random.choice(["gpipe", "1f1b", "eager-1f1b", "forward"]))
    b, last = Builder(), stages - 1
    fuse_last = "1f1b" in schedule or (schedule == "gpipe" and bool(random.integers(2)))
    weights = [b.argument(s, "state", s, (4,)) for s in range(stages)]
    batch = [b.argument(stages, "batch", s, (2,)) for s in range(stages)]
    zeros = [b.value(s) for s in range(stages)]
    made: list[int] = []
    forwards: list[list[int]] = []
    for s in range(stages):
        b.call(f"stage{s}.initialize", (), (zeros[s],), s, "initialize")
    for s in range(stages):
        sources = [v for v in made if b.values[v].stage == s - 1 or random.random() < 0.2]
        if random.random() < 0.2:
            sources.append(weights[int(random.integers(0, s + 1))])
        outs = [b.value(s, (int(random.integers(1, 5)),), each=True) for _ in range(int(random.integers(1, 4)))]
        made += outs
        forwards.append([weights[s], batch[s], *dict.fromkeys(b.move(v, s) for v in sources if v != weights[s])])
        if schedule == "forward" or s < last or not fuse_last:
            b.call(f"stage{s}.forward", forwards[s], outs, s, "forward")
    gradients: list[int] = []
    if schedule != "forward":
        for s in reversed(range(stages)):
            total, out = b.value(s, each=True), b.value(s, (3,), each=True)
            mine = [v for v in made if b.values[v].stage == s]
            head = [zeros[s], *dict.fromkeys(b.move(g, s) for g in gradients if random.random() < 0.7)]
            carried = {"carries": ((0, 0),), "donated": (0,)}
            if s == last and fuse_last:
                name, phase, outs, ins = "forward_backward", "forward_backward", [total, out, *mine], forwards[s]
            else:
                name, phase, outs, ins = "backward", "backward", [total, out], [weights[s], *mine]
            b.call(f"stage{s}.{name}", [*head, *ins], outs, s, phase, **carried)
            gradients.append(out)
        totals = [c.outputs[0] for c in b.calls if "backward" in c.phase]
        for s in range(stages):
            new, partial = b.value(s, (4,)), b.value(s)
            others = dict.fromkeys(b.move(t, s) for t in totals if b.values[t].stage == s or random.random() < 0.3)
            donated = {"donated": (0,)} if random.random() < 0.7 else {}
            b.call(f"stage{s}.update", [weights[s], *others], [new, partial], s, "update", **donated)
            b.results += [ResultPiece(s, new, s), ResultPiece(stages + s, partial)]
    else:
        b.results += [ResultPiece(i, v) for i, v in enumerate(made) if random.random() < 0.5]
    if schedule == "forward":
        order = (tuple(f"F{m}" for m in range(microbatches)),) * stages
    else:
        order = order_of(schedule, stages, microbatches, fuse_last=fuse_last)
    ranks = int(random.integers(1, stages + 1))
    return b.program(schedule, order, microbatches), tuple(s % ranks for s in range(stages))
