"""Plans of Alpa's models, predicted: what it takes to make them, and what a step takes with them.

    python benchmarks/plan.py                                   # every model that was run on 2 devices or more
    python benchmarks/plan.py --models gpt-39B --plans alpa,intra --json out.json
    python benchmarks/plan.py --models gpt-76B --devices 1024 --cluster benchmarks/alpa.toml:h100

A plan is made in a process of its own, from the Python function to a plan whose stages are all solved; nothing runs. Plans
are ``found``, where nothing is given; ``alpa``, the one that Alpa published; ``megatron``, the fastest of a grid of manual plans (tensor × pipeline × data
parallelism × microbatches × rematerialization); ``inter``, a stage for each device; ``intra``, one stage over all devices.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).with_name("alpa.toml")
PLANS = ("found", "alpa", "megatron", "inter", "intra")
Row = dict[str, Any]


@dataclass(frozen=True)
class Manual:
    """A plan by hand: its meshes, and what is computed again in every layer. What is None or ``auto`` is found."""

    mesh: str | None
    num_stages: int | None
    num_microbatches: int | Literal["auto"] | None
    remat: str | None = "none"
    strategy: str = "auto"


def published(name: str) -> Iterator[Manual]:
    """Alpa's plan of a model, with the rematerialization that fits: Alpa's runs compute every layer again."""
    found = tomllib.loads(DATA.read_text())["plan"].get(name)
    if found is not None:
        yield Manual(found["mesh"], found["stages"], found["microbatches"], "all")


def grid(devices: int, per_host: int, blocks: int, batch: int) -> Iterator[Manual]:
    """Manual plans as Megatron's users try them: powers of two, tensor parallelism within a host, 1 to 4 examples at once on
    each data-parallel replica."""
    for tensor in _powers(min(per_host, devices)):
        for stages in _powers(devices // tensor):
            data = devices // (tensor * stages)
            if stages > blocks:
                continue
            for size in (1, 2, 4):
                if batch % (size * data) == 0:
                    for remat in ("none", "products", "all"):
                        mesh = f"data={data},model={tensor}"
                        strategy = "megatron" if tensor * data > 1 else "auto"
                        yield Manual(mesh, stages, batch // (size * data), remat, strategy)


def inter_only(devices: int, blocks: int, batch: int) -> Iterator[Manual]:
    """A stage for each device, and sequences or images one by one."""
    if devices <= blocks:
        yield Manual("data=1", devices, batch, "all")


def intra_only(devices: int, per_host: int, batch: int) -> Iterator[Manual]:
    """One stage over all devices; as many examples at once as there are hosts, or four times as many."""
    model = min(devices, per_host)
    for size in (1, 4):
        yield Manual(f"data={devices // model},model={model}", 1, batch // (size * devices // model), "all")


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def candidates(name: str, plan: str, devices: int, per_host: int) -> list[Manual]:
    """The manual plans of a kind for a model."""
    from bactrian.driver.models.alpa_suite import model_named

    model = model_named(name)
    batch = model.batch
    blocks = len(model.training().parameters["blocks"])
    match plan:
        case "found":
            return [Manual(None, None, None, None)]
        case "alpa":
            return list(published(name))
        case "megatron":
            return list(grid(devices, per_host, blocks, batch))
        case "inter":
            return list(inter_only(devices, blocks, batch))
        case _:
            return list(intra_only(devices, per_host, batch))


def make(name: str, manual: Manual, cluster: str) -> Row:
    """A plan, made in this process."""
    import bactrian
    from bactrian.driver.models.alpa_suite import model_named
    from bactrian.passes.machine.spec import meshes_text

    begin, worked = time.perf_counter(), time.process_time()
    program = model_named(name).training()
    blocks = len(program.parameters["blocks"])
    row: Row = {"model": name, **asdict(manual)}
    try:
        step = bactrian.parallelize(
            program.step,
            num_stages=manual.num_stages,
            num_microbatches=manual.num_microbatches,
            mesh=manual.mesh,
            cluster=cluster,
            remat=manual.remat,
            strategy=manual.strategy,
        )
        traced = step.trace(*program.shapes())
        row["capture_s"] = time.perf_counter() - begin
        is_whole = manual.num_stages is not None and isinstance(manual.num_microbatches, int)
        plan = traced.plan(num_layers=max(blocks, manual.num_stages or 0) if is_whole else None).plan
        flops = sum((stage.forward_flops or 0) + (stage.backward_flops or 0) for stage in plan.stages)
        row |= {
            "step_s": plan.predicted_step_seconds,
            "pflops": flops * plan.num_microbatches / (plan.predicted_step_seconds or 1.0) / 1e15,
            "bound_s": None if plan.pipeline is None else plan.pipeline.bound_seconds,
            "device_bytes": plan.peak_memory_bytes,
            "stages": plan.num_stages,
            "meshes": meshes_text([stage.mesh for stage in plan.stages]),
            "microbatches": plan.num_microbatches,
            "computed_again": ",".join(sorted(set(plan.remat))) or "none",
        }
    except bactrian.BactrianError as error:
        row["error"] = str(error).splitlines()[0]
    row |= {
        "wall_s": time.perf_counter() - begin,
        "cpu_s": time.process_time() - worked,
        "planner_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    return row


def make_apart(name: str, manual: Manual, cluster: str, timeout: float) -> Row:
    """A plan, made in a process of its own, which is ended when it takes too long."""
    alone = json.dumps([name, asdict(manual)])
    command = [sys.executable, __file__, "--alone", alone, "--cluster", cluster]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"model": name, **asdict(manual), "error": f"not made in {timeout:.0f} s", "wall_s": timeout}


def with_devices(cluster: str, devices: int, folder: Path) -> str:
    """A cluster file of the first devices of a cluster of equal hosts."""
    from bactrian.passes.machine.cluster_file import read_cluster

    hosts = read_cluster(cluster).only_group("this benchmark")
    per_host = min(devices, hosts.devices_per_host)
    rates = ", ".join(f"{dtype} = {rate / 1e12}" for dtype, rate in hosts.device.flops_per_second.items())
    lines = {
        "hosts": devices // per_host,
        "devices_per_host": per_host,
        "memory_gib": hosts.memory_bytes / 2**30,
        "memory_gb_per_s": hosts.device.bytes_per_second / 1e9,
        "peak_tflops": f"{{ {rates} }}",
        "intra_host_gb_per_s": hosts.intra_host_bytes_per_second / 1e9,
        "inter_host_gb_per_s": hosts.inter_host_bytes_per_second / 1e9,
        "intra_host_latency_us": hosts.intra_host_latency / 1e-6,
        "inter_host_latency_us": hosts.inter_host_latency / 1e-6,
    }
    path = folder / f"{hosts.name}-{devices}.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return str(path)


def run(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The fastest plan of each kind for each model."""
    from bactrian.driver.models.alpa_suite import SUITE
    from bactrian.passes.machine.cluster_file import read_cluster

    rows, per_host = list[Row](), read_cluster(args.cluster).groups[0].devices_per_host
    for name in args.models.split(",") if args.models else [n for n, m in SUITE.items() if m.devices > 1]:
        devices = args.devices or SUITE[name].devices
        cluster = with_devices(args.cluster, devices, folder)
        for plan in args.plans.split(","):
            manual = candidates(name, plan, devices, per_host)[: args.most]
            tried = [make_apart(name, each, cluster, args.timeout) for each in manual]
            for row in tried:
                print(json.dumps(row), file=sys.stderr, flush=True)
            if tried:
                fastest = min(tried, key=lambda row: row.get("step_s", float("inf")))
                rows.append({"plan": plan, "devices": devices, "tried": len(tried), **fastest})
    return rows


def measured(row: Row) -> float | None:
    """What Alpa's authors measured of the plan, in PFLOPS of all devices."""
    found = tomllib.loads(DATA.read_text())["measured"][row["model"].partition("-")[0]]
    if row["plan"] != "alpa" or row["devices"] not in found["devices"]:
        return None
    return found["alpa"][found["devices"].index(row["devices"])]


_GIVEN = (
    ("stages", "num_stages"),
    ("meshes", "mesh"),
    ("microbatches", "num_microbatches"),
    ("computed_again", "remat"),
)  # what the plan has, and what was given


def table(rows: list[Row]) -> Any:
    """What people look at."""
    from rich.table import Table

    made = Table()
    for text in ("model", "devices", "plan", "stages", "mesh", "µbatches", "remat", "step", "bound", "PFLOPS", "measured",
                 "memory", "made in", "CPU", "planner"):  # fmt: skip
        made.add_column(text, justify="left" if text in ("model", "plan", "mesh", "remat") else "right")
    for row in rows:
        known = measured(row)
        made.add_row(
            row["model"], str(row["devices"]), row["plan"], *(str(row.get(key, row[given])) for key, given in _GIVEN),
            f"{row['step_s']:.4g} s" if "step_s" in row else row["error"],
            f"{row['bound_s']:.4g} s" if row.get("bound_s") else "",
            f"{row['pflops']:.3g}" if "pflops" in row else "", "" if known is None else f"{known:.3g}",
            f"{row['device_bytes'] / 2**30:.1f} GiB" if row.get("device_bytes") else "",
            f"{row['wall_s']:.0f} s", f"{row['cpu_s']:.0f} s" if "cpu_s" in row else "",
            f"{row['planner_bytes'] / 2**30:.2f} GiB" if "planner_bytes" in row else "",
        )  # fmt: skip
    return made


def main() -> None:
    """Run and print."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", help="of the suite, as in gpt-39B,moe-70B; by default all that were run on several devices"
    )
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--devices", type=int, default=0, help="by default those that a model was run on")
    parser.add_argument("--cluster", default=f"{DATA}:p3_16xlarge", metavar="FILE[:NAME]")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a plan")
    parser.add_argument("--most", type=int, help="of the grid's plans; all by default")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        name, manual = json.loads(args.alone)
        print(json.dumps(make(name, Manual(**manual), args.cluster)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder))
    Console(width=180).print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
