"""Time to choose layouts for GPT train steps: read, built, reduced, solved and proved; and the same given to CBC as it is.

    python benchmarks/solve.py                                    # 24 layers on 2 x 4, 48 on 8 x 8; about 2 minutes
    python benchmarks/solve.py --case 24:data=2,model=4 --cbc 120 --json out.json

Each case is a process of its own; tracing and the passes before ``solve-shardings`` are timed, but not part of the sum.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = ("1:data=2,model=4", "6:data=2,model=4", "12:data=2,model=4", "24:data=2,model=4", "48:data=8,model=8")


def step_of(layers: int, width: int) -> tuple[Any, tuple[Any, ...]]:
    """The example's GPT with AdamW, and abstract arguments."""
    import jax

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    example = importlib.import_module("train_gpt")
    args = argparse.Namespace(
        layers=layers, width=width, heads=16, length=512, batch=64, dropout=0.1,
        rate=3e-3, steps=400, seed=0, stages=None, microbatches=1, schedule="1f1b",
    )  # fmt: skip
    made = dict[str, Any]()

    def state() -> Any:
        state, made["step"], _ = example.make_steps(args)
        return state

    shapes = jax.eval_shape(state)
    text, _ = example.read_text()
    return made["step"], (shapes, next(example.batches(text, args.batch, args.length, 0)))


def run_case(layers: int, mesh_text: str, width: int, microbatches: int, cbc_seconds: float) -> dict[str, Any]:
    """One case in this process."""
    import bactrian.passes.network.lifted_lp  # noqa: F401 -- the solver's libraries are loaded before the clock runs
    from bactrian.driver.gc_pause import paused_collection
    from bactrian.passes import pipelines
    from bactrian.passes.frame.pipeline import run_pipeline
    from bactrian.passes.ir.regions import main_function
    from bactrian.passes.machine.cluster import CPU_HOST
    from bactrian.passes.machine.spec import parse_axes
    from bactrian.passes.network.solver import solve
    from bactrian.passes.sharding.sharding_model import ShardingModel
    from bactrian.passes.sharding.work_from_ir import read_program

    step, arguments = step_of(layers, width)
    axes = parse_axes(mesh_text)
    marks = [time.perf_counter()]
    with paused_collection():
        module = step.with_options(num_stages=1, num_microbatches=microbatches).trace(*arguments).captured.module()
        run_pipeline(module, [*pipelines.import_step(mesh_text), *pipelines.form_stages(1, 1, mesh=mesh_text)])
        run_pipeline(module, pipelines.localize_stages())
        marks.append(time.perf_counter())
        run_pipeline(module, pipelines.prepare_shardings())
        mesh = CPU_HOST.mesh(axes)
        with module.context:
            reading = read_program(main_function(module), mesh, CPU_HOST, microbatches, lambda op, text: None)
        marks.append(time.perf_counter())
        network = ShardingModel(reading.problem, mesh, None).network
        marks.append(time.perf_counter())
        solution = solve(network, 120)
        marks.append(time.perf_counter())
    before, read, built, solved = (b - a for a, b in itertools.pairwise(marks))
    found: dict[str, Any] = {
        "layers": layers, "mesh": mesh_text, "microbatches": microbatches, "ops": len(reading.flow.ops), "strategies": network.num_strategies,
        "before_s": before, "read_s": read, "built_s": built, "solved_s": solved, "sum_s": read + built + solved,
        "cost_s": solution.cost, "bound_s": solution.lower_bound, "optimal": solution.optimal,
    }  # fmt: skip
    if cbc_seconds:
        found["cbc"] = by_cbc(network, cbc_seconds)
    return found


def by_cbc(network: Any, seconds: float) -> dict[str, Any]:
    """The network as one integer program, nothing reduced, given to CBC: a binary for each strategy and for each pair."""
    import numpy as np
    from ortools.linear_solver import linear_solver_pb2, pywraplp

    begin = time.perf_counter()
    model = linear_solver_pb2.MPModelProto()

    def add(costs: Any) -> range:
        first = len(model.variable)
        for cost in costs:
            model.variable.add(lower_bound=0, upper_bound=1, objective_coefficient=float(cost), is_integer=True)
        return range(first, first + len(costs))

    def equation(plus: Any, minus: Any, right: float) -> None:
        row = model.constraint.add(lower_bound=right, upper_bound=right)
        row.var_index.extend([*plus, *minus])
        row.coefficient.extend([1.0] * len(plus) + [-1.0] * len(minus))

    nodes = [add(costs) for costs in network.costs]
    for columns in nodes:
        equation(columns, [], 1.0)
    for (i, j), matrix in zip(network.edges, network.edge_costs, strict=True):
        pairs = np.array(add(matrix.ravel())).reshape(matrix.shape)
        for k, column in enumerate(nodes[i]):
            equation(pairs[k].tolist(), [column], 0.0)
        for k, column in enumerate(nodes[j]):
            equation(pairs[:, k].tolist(), [column], 0.0)
    solver = pywraplp.Solver.CreateSolver("CBC")
    solver.LoadModelFromProto(model)
    solver.SetTimeLimit(int(1000 * seconds))
    built = time.perf_counter() - begin
    status = solver.Solve()
    has_answer = status in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE)
    return {
        "built_s": built,
        "solved_s": time.perf_counter() - begin - built,
        "optimal": status == pywraplp.Solver.OPTIMAL,
        "cost_s": solver.Objective().Value() if has_answer else None,
        "variables": solver.NumVariables(),
        "rows": solver.NumConstraints(),
    }


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="LAYERS:MESH", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--microbatches", type=int, default=1, help="gradients may stay unreduced over them")
    parser.add_argument(
        "--cbc", type=float, default=0.0, metavar="S", help="give each case to CBC too, for so many seconds"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        layers, _, mesh = args.alone.partition(":")
        print(json.dumps(run_case(int(layers), mesh, args.width, args.microbatches, args.cbc)))
        return
    rows = list[dict[str, Any]]()
    for case in args.case or CASES:
        command = [sys.executable, __file__, "--alone", case, "--width", str(args.width)]
        command += ["--microbatches", str(args.microbatches), "--cbc", str(args.cbc)]
        rows.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for header in ("layers", "mesh", "ops", "strategies", "read", "built", "solved", "sum", "proved", "trace, passes"):
        table.add_column(header, justify="right")
    for row in rows:
        times = [f"{row[name]:.2f} s" for name in ("read_s", "built_s", "solved_s", "sum_s")]
        proved = "yes" if row["optimal"] else f"gap {1 - row['bound_s'] / row['cost_s']:.2%}"
        sizes = [str(row["layers"]), row["mesh"], f"{row['ops']:,}", f"{row['strategies']:,}"]
        table.add_row(*sizes, *times, proved, f"{row['before_s']:.1f} s")
    Console(width=120).print(table)
    for row in rows:
        if "cbc" in row:
            print(f"CBC, {row['layers']} layers, unreduced: {row['cbc']}; ours {row['cost_s']:.6g} s")


if __name__ == "__main__":
    main()
