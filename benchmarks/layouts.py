"""Chosen shardings against the baselines: predicted, and measured on virtual devices.

    python benchmarks/layouts.py --cluster cluster.toml               # five small models on 2 x 4 virtual devices, 15 minutes
    python benchmarks/layouts.py --suite --json out.json                     # predicted only, for Alpa's models

A model is a process of its own; its plans run step by step in turn. ``cluster.toml`` comes from ``bactrian profile-cluster``. The
memory of a function is what XLA says of it (``get_compiled_memory_stats``), with what else lies on a device while it runs;
with ``--rounds 0`` plans are compiled and not run. ``--bytes`` runs nothing either: it compares the bytes that plans say to send
with those of the collectives in the stage functions and in XLA's HLO, by kind.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STRATEGIES = ("auto", "data", "zero1", "zero2", "zero3", "megatron")
Row = dict[str, Any]


def compiled_memory(planned: Any, devices: Any) -> int:
    """Bytes of a device at the peak: what XLA needs for a function, and the state that it doesn't read."""
    from bactrian.driver.xla.compile_stage import compile_function, function_texts

    program = planned.staged.program
    sizes = dict(program.mesh(0))

    def held(value: int) -> int:
        return program.values[value].nbytes // program.values[value].spec.num_shards(sizes)

    texts, most = function_texts(planned.staged.module), 0
    for call in program.calls:
        found = compile_function(texts[call.function], devices).get_compiled_memory_stats()
        arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
        others = [p.value for p in program.arguments if p.role != "batch" and p.value not in call.inputs]
        most = max(most, arguments + results + found.temp_size_in_bytes + sum(map(held, others)))
    return most


def sent_bytes(planned: Any) -> Row:
    """What a device of each stage sends in a step: predicted, counted in its functions, and of XLA's HLO."""
    predicted = dict[str, int]()
    for stage in planned.plan.stages:
        for kind, nbytes in stage.sharding.sent_bytes:
            predicted[kind] = predicted.get(kind, 0) + nbytes
    comparison = planned.compare_xla()
    return {
        "predicted": predicted,
        "counted": comparison.planned,
        "xla": comparison.compiled,
        "differences": len(comparison.differences),
    }


def run_model(args: argparse.Namespace) -> Row:
    """One small model in this process."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax
    import suite

    import bactrian

    made = suite.SMALL[args.alone]()
    steps, rows = dict[str, Any](), dict[str, Row]()
    for strategy in args.plans.split(","):
        step = bactrian.parallelize(
            made.step, num_stages=args.stages, mesh=args.mesh, cluster=args.cluster, strategy=strategy,
            num_microbatches=args.microbatches,
        )  # fmt: skip
        planned = step.trace(*made.shapes()).plan()
        if args.bytes:
            rows[strategy] = sent_bytes(planned)
            continue
        chosen = planned.plan.stages[0].sharding
        rows[strategy] = {
            "predicted_s": chosen.seconds, "bound_s": chosen.bound_seconds,
            "sent_bytes": sum(nbytes for _, nbytes in chosen.sent_bytes),
            "memory_bytes": chosen.peak_bytes,
            "held_bytes": sum(nbytes for _, nbytes in chosen.memory_bytes),  # of the values that the solver sees
            "compiled_memory_bytes": compiled_memory(planned, jax.devices()[: args.devices]),
            "seconds": [],
        }  # fmt: skip
        if args.rounds:
            steps[strategy] = step, made.state()
    batch = made.batch() if args.rounds else None
    for number in range(args.rounds + 2):
        for strategy, (step, state) in steps.items():
            begin = time.perf_counter()
            state, value = step(state, batch)
            jax.block_until_ready((state, value))
            steps[strategy] = step, state
            if number >= 2:  # the first compile, the second warm up
                rows[strategy]["seconds"].append(time.perf_counter() - begin)
    return {"model": args.alone, "rows": rows}


def run_suite(args: argparse.Namespace) -> list[Row]:
    """Plans of Alpa's models on one stage over its devices, predicted."""
    import bactrian
    from bactrian.driver.models.alpa_suite import SUITE

    found = list[Row]()
    for name, model in SUITE.items():
        devices = model.devices
        if name.partition("-")[0] not in args.families.split(",") or not 2 <= devices <= args.most:
            continue
        mesh = f"data={max(1, devices // 4)},model={min(4, devices)}"
        made = model.training().with_batch(args.batch or 4 * devices)
        begin = time.perf_counter()
        step = bactrian.parallelize(made.step, num_stages=1, mesh=mesh, cluster=args.cluster)
        row: Row = {"model": name, "mesh": mesh}
        try:
            chosen = step.trace(*made.shapes()).plan(compare=True).plan.stages[0].sharding
            row |= {"predicted_s": chosen.seconds, "bound_s": chosen.bound_seconds,
                    "compared": {each.name: each.seconds for each in chosen.compared}}  # fmt: skip
        except bactrian.InfeasiblePlanError as error:
            row["error"] = str(error).splitlines()[0]
        row["took_s"] = time.perf_counter() - begin
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def table_of_model(found: Row) -> Any:
    """What people look at."""
    from rich.table import Table

    rows: dict[str, Row] = found["rows"]
    named = [row for name, row in rows.items() if name != "auto"]
    table = Table(title=found["model"], title_justify="left")
    for text in ("plan", "predicted", "measured", "measured / best named", "sends", "memory", "of XLA's"):
        table.add_column(text, justify="left" if text == "plan" else "right")
    for name, row in rows.items():
        times = row["seconds"]
        best = min(named, key=lambda other: statistics.median(other["seconds"])) if times else None
        ratios = [a / b for a, b in zip(times, best["seconds"], strict=True)] if best else []
        table.add_row(
            name, f"{1e3 * row['predicted_s']:.1f} ms",
            f"{1e3 * statistics.median(times):.1f} ms" if times else "",
            f"{statistics.median(ratios):.3f}" if ratios else "",
            f"{row['sent_bytes'] / 2**20:.2f} MiB", f"{row['memory_bytes'] / 2**20:.2f} MiB",
            f"{row['memory_bytes'] / row['compiled_memory_bytes']:.3f}",
        )  # fmt: skip
    return table


def table_of_bytes(found: Row) -> Any:
    """Predicted and compiled communication of each plan, by kind."""
    from rich.table import Table

    table = Table(title=found["model"], title_justify="left")
    for text in ("plan", "kind", "predicted", "counted", "XLA", "XLA / predicted", "differences"):
        table.add_column(text, justify="left" if text in ("plan", "kind", "differences") else "right")
    for name, row in found["rows"].items():
        columns = [row[key] for key in ("predicted", "counted", "xla")]
        sums = [sum(column.values()) for column in columns]
        kinds = sorted({kind for column in columns for kind in column})
        for kind in kinds:
            table.add_row("", kind.replace("_", "-"), *(f"{column.get(kind, 0):,.0f}" for column in columns), "", "")
        ratio = f"{sums[2] / sums[0]:.3f}" if sums[0] else ""
        table.add_row(
            name, "all", *(f"{nbytes:,.0f}" for nbytes in sums), ratio, str(row["differences"]), end_section=True
        )
    return table


def memory_ratios(found: list[Row]) -> str:
    """Predicted memory over what XLA says, of all plans: least, median and most."""
    lines = list[str]()
    for key, what in (("memory_bytes", "predicted memory"), ("held_bytes", "of it values that the solver sees")):
        ratios = [row[key] / row["compiled_memory_bytes"] for model in found for row in model["rows"].values()]
        low, high = min(ratios), max(ratios)
        lines.append(f"{what} / XLA's: {low:.3f} at least, {statistics.median(ratios):.3f} median, {high:.3f} at most")
    return "\n".join(lines)


def table_of_suite(found: list[Row]) -> Any:
    """Predicted seconds of every plan."""
    from rich.table import Table

    table = Table()
    for text in ("model", "mesh", "chosen", "bound", *STRATEGIES[1:], "planned in"):
        table.add_column(text, justify="left" if text in ("model", "mesh") else "right")
    for row in found:
        compared = row.get("compared", {})
        table.add_row(
            row["model"], row["mesh"],
            *(f"{row[key]:.4g} s" if key in row else "no room" for key in ("predicted_s", "bound_s")),
            *("–" if compared.get(name) is None else f"{compared[name]:.4g} s" for name in STRATEGIES[1:]),
            f"{row['took_s']:.0f} s",
        )  # fmt: skip
    return table


def main() -> None:
    """Run and print."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mlp,gpt,moe,wide-resnet,encoder-decoder")
    parser.add_argument("--mesh", default="data=2,model=4")
    parser.add_argument("--cluster", help="TOML file of the machine")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each plan; 0 to run none")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--stages", type=int, default=1, help="each on a mesh of its own; with --bytes only")
    parser.add_argument("--plans", default=",".join(STRATEGIES), help="all by default")
    parser.add_argument("--bytes", action="store_true", help="compare what is sent with XLA's HLO; run nothing")
    parser.add_argument("--suite", action="store_true", help="plan Alpa's models, and run nothing")
    parser.add_argument("--families", default="gpt,moe,wresnet")
    parser.add_argument("--most", type=int, default=8, help="devices: larger rows of the suite are left out")
    parser.add_argument("--batch", type=int, default=0, help="of the suite's models; default 4 per device")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.devices = math.prod(int(part.partition("=")[2]) for part in args.mesh.split(","))
    console = Console(width=120)
    if args.stages > 1 and not args.bytes:
        parser.error("--stages is for --bytes: other figures are of one stage")
    if args.alone:
        print(json.dumps(run_model(args)))
        return
    if args.suite:
        found = run_suite(args)
        console.print(table_of_suite(found))
    else:
        found = list[Row]()
        for name in args.models.split(","):
            command = [sys.executable, __file__, "--alone", name, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            console.print((table_of_bytes if args.bytes else table_of_model)(found[-1]))
        if not args.bytes:
            console.print(memory_ratios(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
