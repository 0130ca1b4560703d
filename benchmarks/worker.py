"""One measurement in processes of its own, started by ``pipeline.py``: rank 0 prints one JSON line.

The hooks into the compiled step are `time_functions` and `replace_functions`; everything else is public.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from programs import PROGRAMS, gpt, mlp

BLOCK = 4  # steps


def wait(tree: Any) -> None:
    """Until every array here, local or distributed, is computed."""
    import jax

    arrays = list[Any]()
    for leaf in jax.tree.leaves(tree):
        pieces = getattr(leaf, "pieces", None)
        arrays += [leaf] if pieces is None else pieces.values()
    for array in arrays:  # the list in one call takes longer, all of it counted as the step's
        array.block_until_ready()


def barrier() -> None:
    """All ranks meet; in one process nothing happens."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) > 1:
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()


def time_steps(step: Callable[..., Any], state: Any, batch: Any, count: int) -> tuple[list[float], Any, list[float]]:
    """Seconds of each of ``count`` steps (over when every rank has its update), the last state, and the losses."""
    seconds, losses = list[float](), list[Any]()
    for _ in range(count):
        barrier()
        begin = time.perf_counter()
        state, result = step(state, batch)
        wait((state, result))
        barrier()
        seconds.append(time.perf_counter() - begin)
        losses.append(result["loss"] if isinstance(result, dict) else result)
    return seconds, state, [float(loss) for loss in losses]


# Hooks


@contextmanager
def replace_functions(compiled: Any, wrap: Callable[[str, Any], Any]) -> Generator[None]:
    """Within the block, the executor calls ``wrap(symbol, function)`` in the place of each stage function."""
    functions: dict[str, Any] = compiled.session.functions
    originals = dict(functions)
    functions.update({symbol: wrap(symbol, function) for symbol, function in originals.items()})
    compiled.observe()  # binds the instructions again
    try:
        yield
    finally:
        functions.update(originals)
        compiled.observe()


@contextmanager
def time_functions(compiled: Any) -> Generator[list[float]]:
    """Within the block, collect the seconds of each call of a stage function in the order of this rank's calls: work
    only, no waiting for inputs.

    Only inputs that are loaded, received or copied are waited for: others are ready, since the state was when the step
    began and every call ends with its results. To ask for all of them costs a step of the GPT half a percent.
    """
    seconds = list[float]()
    late = dict[str, set[int]]()
    for each in compiled.session.streams:
        runs = [x for x in each.instructions if hasattr(x, "function")]
        ready = {slot for x in runs for slot in x.outputs} | {argument.slot for argument in each.arguments}
        for run in runs:
            late.setdefault(run.function, set()).update(i for i, x in enumerate(run.inputs) if x not in ready)

    def wrap(symbol: str, function: Any) -> Any:
        positions = sorted(late.get(symbol, ()))

        def timed(arguments: Any) -> Any:
            for position in positions:
                arguments[position].block_until_ready()
            begin = time.perf_counter()
            results = function(arguments)
            if results:
                results[-1].block_until_ready()  # all of a call's results are ready together
            seconds.append(time.perf_counter() - begin)
            return results

        return timed

    with replace_functions(compiled, wrap):
        yield seconds


# Measurements


def ideal_seconds(lists: Sequence[Sequence[Any]], seconds: Sequence[Sequence[float]]) -> float:
    """When a schedule ends if nothing but the stage functions took time.

    Args:
        lists: for each rank its ``Run`` instructions, in order.
        seconds: of each of them.

    Two stages, two microbatches, one second each, fused last stage of two: F0 ends at 1, FB0 at 3, B0 at 4;
    F1 at 2, FB1 at 5, B1 at 6.
    """
    ends = dict[tuple[str, int, int], float]()
    updates = [x for runs in lists for x in runs if x.phase == "update"]
    stages = 1 + max(x.stage for runs in lists for x in runs)
    fused = {x.stage for runs in lists for x in runs if x.phase == "forward_backward"}
    backward_of = {s: "forward_backward" if s in fused else "backward" for s in range(stages)}

    def needs(run: Any) -> list[tuple[str, int, int]]:
        key: list[tuple[str, int, int]] = []
        if run.phase in ("forward", "forward_backward") and run.stage:
            key.append(("forward", run.stage - 1, run.microbatch))
        if run.phase == "backward":
            key.append(("forward", run.stage, run.microbatch))
            if run.stage + 1 < stages:
                key.append((backward_of[run.stage + 1], run.stage + 1, run.microbatch))
        if run.phase == "update" and _round(run.function):
            key += [(x.function, x.stage, -1) for x in updates if _round(x.function) < _round(run.function)]
        return key

    at, clock = [0] * len(lists), [0.0] * len(lists)
    while any(i < len(runs) for i, runs in zip(at, lists, strict=True)):
        before = list(at)
        for rank, runs in enumerate(lists):
            while at[rank] < len(runs) and all(key in ends for key in needs(runs[at[rank]])):
                run = runs[at[rank]]
                begin = max([clock[rank], *(ends[key] for key in needs(run))])
                clock[rank] = begin + seconds[rank][at[rank]]
                ends[run.function if run.phase == "update" else run.phase, run.stage, run.microbatch] = clock[rank]
                at[rank] += 1
        if at == before:
            raise ValueError("the lists can't be carried out in this order")
    return max(clock)


def _round(function: str) -> int:
    """The round of an update: ``stage0.update_2`` is 2."""
    suffix = function.partition(".update")[2]
    return int(suffix[1:]) if suffix else 0


def measure_pipeline(args: argparse.Namespace) -> dict[str, Any]:
    """Blocks of steps, in turn plain and with each call of a stage function timed, so that both see the same machine."""
    step, state, batch = PROGRAMS[args.model]()
    if args.plan:
        step = step.with_options(plan=args.plan, cluster=args.cluster, num_microbatches=None, schedule=None)
    else:
        step = step.with_options(num_stages=args.stages, num_microbatches=args.microbatches, schedule=args.schedule)
    _, state, losses = time_steps(step, state, batch, args.warmup)
    compiled = step.compiled
    plain, timed, own = list[float](), list[float](), list[list[float]]()
    later = losses
    for _ in range(max(1, args.steps // BLOCK)):
        times, state, _ = time_steps(step, state, batch, 1 + BLOCK)
        plain += times[1:]  # the first after a change is not like the others
        with time_functions(compiled) as seconds:
            for number in range(1 + BLOCK):
                seconds.clear()
                times, state, later = time_steps(step, state, batch, 1)
                if number:
                    timed += times
                    own.append(list(seconds))
    by_rank = compiled.session.world.control.allgather(own)  # rank, step, call
    lists = [[x for x in each.instructions if hasattr(x, "function")] for each in compiled.session.streams]
    ideals = [ideal_seconds(lists, calls) for calls in zip(*by_rank, strict=True)]
    medians = [median_of_functions(runs, steps) for runs, steps in zip(lists, by_rank, strict=True)]
    calls = [[mine[run.function] for run in runs] for runs, mine in zip(lists, medians, strict=True)]
    functions = {symbol: value for mine in medians for symbol, value in mine.items()}
    return predicted(compiled, functions) | {
        "seconds": plain,
        "timed_seconds": timed,
        "ideal_seconds": ideals,
        "efficiency": median(ideal / real for ideal, real in zip(ideals, timed, strict=True)),
        "efficiency_of_medians": ideal_seconds(lists, calls) / median(plain),
        "function_seconds": functions,
        "loss_first": losses[0],
        "loss_last": later[-1],
    }


def predicted(compiled: Any, measured: dict[str, float]) -> dict[str, Any]:
    """What the plan predicts of a step and of each call; and of a step whose calls take what was measured."""
    from dataclasses import replace

    from bactrian.driver.planning.simulated_step import pipeline_of
    from bactrian.passes.pipelining.pipeline_events import simulate

    pipeline = pipeline_of(compiled.plan, compiled.session.staged.program)
    if pipeline is None:
        return {}
    functions = tuple(replace(each, seconds=measured[each.name]) for each in pipeline.functions)
    return {
        "predicted_seconds": compiled.plan.predicted_step_seconds,
        "predicted_functions": {each.name: each.seconds for each in pipeline.functions},
        "simulated_seconds": simulate(replace(pipeline, functions=functions)).seconds,
    }


def median_of_functions(runs: Sequence[Any], steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median seconds of each stage function of a rank, of the seconds of its calls step by step."""
    values = dict[str, list[float]]()
    for step in steps:
        for run, seconds in zip(runs, step, strict=True):
            values.setdefault(run.function, []).append(seconds)
    return {symbol: median(each) for symbol, each in values.items()}


def measure_solo(args: argparse.Namespace) -> dict[str, Any]:
    """The reference as one jitted program: a scan over the microbatches and the update."""
    from bactrian.driver.capture.reference_step import reference_function

    step, state, batch = PROGRAMS[args.model]()
    captured = step.with_options(num_microbatches=args.microbatches).trace(state, batch).captured
    plain = reference_function(captured, donate_state=True)
    _, state, losses = time_steps(plain, state, batch, args.warmup)
    seconds, _, later = time_steps(plain, state, batch, args.steps)
    return {"seconds": seconds, "loss_first": losses[0], "loss_last": later[-1]}


def measure_one_stage(args: argparse.Namespace) -> dict[str, Any]:
    """One stage on one device and the jitted reference, step by step in turn."""
    import jax
    import jax.numpy as jnp

    from bactrian.driver.capture.reference_step import reference_function

    step, state, batch = PROGRAMS[args.model]()
    ours = step.with_options(num_stages=1, num_microbatches=args.microbatches)
    plain = reference_function(ours.trace(state, batch).captured, donate_state=True)
    functions = ours, plain
    states = [jax.tree.map(jnp.copy, state) for _ in functions]  # each donates its own
    times: list[list[float]] = [[], []]
    for number in range(args.warmup + args.steps):
        for side in (0, 1) if number % 2 else (1, 0):
            seconds, states[side], _ = time_steps(functions[side], states[side], batch, 1)
            if number >= args.warmup:
                times[side] += seconds
    return {"ours": times[0], "jit": times[1]}


def measure_planning(args: argparse.Namespace) -> dict[str, Any]:
    """From ``step.trace`` to the end of ``split-stages`` for a deep GPT with AdamW; compiles nothing."""
    import jax

    step, state, batch = gpt(layers=args.layers, width=64)
    abstract = jax.eval_shape(lambda *x: x, state, batch)
    begin = time.perf_counter()
    traced = step.with_options(num_stages=args.stages, num_microbatches=args.microbatches).trace(*abstract)
    middle = time.perf_counter()
    planned = traced.plan()
    end = time.perf_counter()
    return {
        "trace_seconds": middle - begin,
        "plan_seconds": end - middle,
        "seconds": end - begin,
        "ops": traced.text.count(" stablehlo."),
        "stages": planned.plan.num_stages,
    }


def measure_instructions(args: argparse.Namespace) -> dict[str, Any]:
    """The executor's time per instruction with stage functions that do nothing but hand out ready arrays."""
    import jax
    import jax.numpy as jnp

    step, state, batch = mlp(width=8, batch=args.microbatches, length=1)
    step = step.with_options(num_stages=args.stages, num_microbatches=args.microbatches)
    _, state, _ = time_steps(step, state, batch, 2)
    session = step.compiled.session
    count = sum(len(each.instructions) for each in session.streams)

    def wrap(symbol: str, function: Any) -> Any:
        made: list[Any] = []

        def hand_out(arguments: Any) -> Any:
            if not made:
                made.extend(function([jnp.array(x, copy=True, device=x.sharding) for x in arguments]))
                jax.block_until_ready(made)
            return made

        return hand_out

    by_argument = {leaf.placement.argument: leaf.pieces for leaf in jax.tree.leaves(state)}
    pieces = [by_argument[argument][stage] for argument, stage in session.arguments]
    numbers = [info.number for info in step.compiled.captured.arguments if info.role == "batch"]
    arrays = dict(zip(numbers, jax.tree.leaves(batch), strict=True))
    with replace_functions(step.compiled, wrap):
        session.run(pieces, arrays)
        seconds = list[float]()
        for _ in range(args.steps * 10):
            begin = time.perf_counter()
            session.run(pieces, arrays)
            seconds.append(time.perf_counter() - begin)
    return {"seconds_per_instruction": [x / count for x in seconds], "instructions": count}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "pipeline": measure_pipeline,
    "solo": measure_solo,
    "one-stage": measure_one_stage,
    "planning": measure_planning,
    "instructions": measure_instructions,
}


def main() -> None:
    """Read what to measure, pin this process if asked, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--model", choices=PROGRAMS, default="mlp")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--plan", help="a saved plan, in the place of stages, microbatches and schedule")
    parser.add_argument("--cluster", default="", help="the file of the machine that the plan was made for")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--core", type=int, help="pin this process to one core, before jax starts")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    result = MEASUREMENTS[args.measurement](args)
    from bactrian import is_main_rank

    if is_main_rank():
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
