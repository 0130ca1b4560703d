"""Gives mutated inputs to Bactrian's commands, each in a process of its own: ``mutated_inputs.py KIND SEED FIRST COUNT``.

KIND is ``ir`` (the files of ``lit_tests`` into ``bactrian-opt``), ``step`` (a train step before each pass), ``plan``,
``saved`` (a plan with its ``solve.mlir``), ``cluster`` or ``problem``. A case fails if
it says that the fault is Bactrian's (exit code 1 or 5), shows a traceback, dies of a signal, or works longer than
`SECONDS`. The failures are printed as JSON, one a line, and then how often each exit code came.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusters import cluster_text
from jaxlib.mlir import ir
from mutations import OF_DATA, OF_IR, mutated, mutated_json

from bactrian.driver import cli, opt
from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.plan_program import plan_program
from bactrian.passes import pipelines
from bactrian.passes.frame import pipeline
from bactrian.passes.frame.context import make_context
from bactrian.passes.plan.pipeline_record import OtherPipeline, PipelineRecord, TriedMicrobatches
from bactrian.passes.plan.schema import PLAN_FILE, UNSOLVED_FILE, LayerPlan, Plan, StagePlan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming, TransferTiming

LIT = Path(__file__).resolve().parent.parent / "lit_tests"
CAPTURED = Path(__file__).resolve().with_name("captured.mlir")
SECONDS = 20  # of work
PATIENCE = 10  # times as long by the clock: what waits for something that never comes does no work
MEMORY_BYTES = 12 << 30
_OURS = {"%s", "--split-input-file", "--verify-diagnostics"}  # words of RUN lines that say where or how to look


@dataclasses.dataclass(frozen=True)
class Case:
    """One mutated input: what is run on it, the file that it is in, and others that the command reads besides."""

    words: tuple[str, ...]
    text: str
    command: Callable[[list[str]], int]
    file: str
    others: tuple[tuple[str, str], ...] = ()


@functools.cache
def _runs() -> list[tuple[tuple[str, ...], list[str]]]:
    """What RUN lines give to ``bactrian-opt``, with the modules of their file."""
    found = list[tuple[tuple[str, ...], list[str]]]()
    for path in sorted(LIT.glob("*.mlir")):
        text = path.read_text()
        parts = [part for part in re.split(r"^// -----.*\n?", text, flags=re.MULTILINE) if part.strip()]
        for line in re.findall(r"// RUN: (?:not )?bactrian-opt (.*)", text):
            words = shlex.split(re.split(r"\s*(?:2>&1)?\s*\|", line)[0])
            found.append((tuple(word for word in words if word not in _OURS), parts))
    return found


def step_case(rng: random.Random) -> Case:
    """A train step before one of the passes of the whole pipeline, for this pass and all that follow."""
    rest, text = rng.choice(_made_elsewhere("write_boundaries"))
    words = (f"--pass-pipeline={rest}", "{file}", "--reproducer-dir={folder}")
    return Case(words, mutated(rng, text, OF_IR), opt.main, "x.mlir")


@functools.cache
def _made_elsewhere(function: str) -> Any:
    """What a function of this file gives in another process: this one must not have MLIR's threads when it forks."""
    program = f"import json, sys, mutated_inputs; json.dump(mutated_inputs.{function}(), sys.stdout)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def write_boundaries() -> list[tuple[str, str]]:
    """For each pass of the pipeline: it and what follows, and ``captured.mlir`` before it; in two stages, of one device
    each and of two."""
    found = list[tuple[str, str]]()
    for mesh in ("", "data=2"):
        steps = pipeline.resolve(pipelines.stage_step(2, mesh=mesh))
        with make_context():
            module = ir.Module.parse(CAPTURED.read_text())
            for number, step in enumerate(steps):
                found.append((pipeline.pipeline_text(steps[number:]), str(module)))
                pipeline.run_pipeline(module, [step])
    return found


def ir_case(rng: random.Random) -> Case:
    """A module of a lit test, for the passes that the test runs."""
    words, parts = rng.choice(_runs())
    return Case(
        (*words, "{file}", "--reproducer-dir={folder}"), mutated(rng, rng.choice(parts), OF_IR), opt.main, "x.mlir"
    )


SHARDING = ShardingPlan(
    "auto", 0.5, 0.25, 1, 0.125, (("all_reduce", 64),), (("state", 9),), 1 << 30, 99, 7, (("w", "data,-"),),
    (ShardingFigures("zero3", 1.0, 0.5, 64),),
)  # fmt: skip
PLAN = Plan(
    num_stages=2,
    num_microbatches=4,
    schedule="1f1b",
    num_layers=3,
    stages=(
        StagePlan(
            0, 0, 1, (("data", 2), ("model", 1)), 0, 10, 20, 5, 20, 40, 8, 64, 2, 16, 16, 32, 0.5, SHARDING,
            StageTiming(0.01, 0.02, 0.1, 0.05, 0.001, 0.2, 0.1, 0.15),
        ),
        StagePlan(1, 2, 2, (("data", 2), ("model", 1)), 2, 10, 20, 5, 20, 40, 0, 64, 1, 0, 16, 32, 0.25),
    ),
    layers=tuple(LayerPlan(layer, "stablehlo.add at a.py:1", (f"block{layer}",)) for layer in range(3)),
    predicted_step_seconds=0.75,
    peak_memory_bytes=1 << 20,
    options=(("epsilon", 0.1), ("strategy", "auto")),
    remat=("none", "all", "products"),
    pipeline=PipelineRecord(
        0.75,
        0.5,
        0.7,
        8,
        4,
        ("schedule",),
        (TriedMicrobatches(4, "1f1b", 0.75), TriedMicrobatches(8)),
        OtherPipeline(3, "1f1b", 0.8),
    ),
    transfers=(TransferTiming(0, 1, 64, 0.001, 0.0001, ("host 0",)),),
).to_json()  # fmt: skip
CLUSTER = cluster_text(
    "f32 = 1e-5, default = 2e-5",
    0.001,
    0.01,
    tables="inter_host_gb_per_s = 1.0\nname = 'lab'\n[measured.all_gather.4]\nbytes = [16, 4096]\nseconds = [1e-6, 1e-5]\n",
)
PROBLEM = json.dumps(
    {
        "problem": {
            "name": "small",
            "nodes": {
                "intervals": [[0, 3], [1, 4], [2, 4]],
                "costs": [[1, 2], [3, 4, 5], [6]],
                "usages": [[10, 5], [7, 7, 1], [2]],
            },
            "edges": {"nodes": [[0, 1], [1, 2]], "costs": [[1, 2, 3, 4, 5, 6], [0, 1, 2]]},
            "usage_limit": 20,
        }
    }
)
SHARDED = """
module attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  func.func public @main(%x: tensor<64x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> (tensor<64x64xf32> {bactrian.updates = 1 : i64}) {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>
    %n = stablehlo.subtract %w, %y {bactrian.phase = "update"} : tensor<64x64xf32>
    return %n : tensor<64x64xf32>
  }
}
"""


def plan_case(rng: random.Random) -> Case:
    """A plan, to be shown or compared."""
    sound = "{folder}/sound.json"
    words = rng.choice([("explain", "{file}"), ("diff", "{file}", sound), ("diff", sound, "{file}")])
    return Case(words, _mutated_json(rng, PLAN), cli.main, PLAN_FILE, (("sound.json", PLAN),))


def saved_case(rng: random.Random) -> Case:
    """A plan with the module before its shardings were chosen, to explain one of them."""
    texts = _made_elsewhere("write_saved")
    name = rng.choice([PLAN_FILE, UNSOLVED_FILE])
    text = _mutated_json(rng, texts[name]) if name == PLAN_FILE else mutated(rng, texts[name], OF_IR)
    words = ("explain", "{folder}", "--value", "stablehlo.maximum", "--time-limit=5")
    return Case(words, text, cli.main, name, tuple((other, texts[other]) for other in texts if other != name))


def write_saved() -> dict[str, str]:
    """What `bactrian plan --save` writes of ``captured.mlir`` in two stages of two devices."""
    meshes = ((("data", 2),),) * 2
    with make_context(), tempfile.TemporaryDirectory() as folder:
        module = ir.Module.parse(CAPTURED.read_text())
        kept = {"fingerprint": "f" * 64, "platform": "cpu", "schedule": "1f1b", "num_microbatches": 2}
        plan_program(module, Decisions(2, meshes), paths="abcxy", **kept).save(folder)
        return {name: (Path(folder) / name).read_text() for name in (PLAN_FILE, UNSOLVED_FILE)}


def cluster_case(rng: random.Random) -> Case:
    """A cluster, to choose shardings for."""
    steps = "builtin.module(func.func(sdy-populate-op-sharding-rules),solve-shardings{cluster={file} time-limit=5})"
    words = (f"--pass-pipeline={steps}", "{folder}/sound.mlir")
    return Case(words, mutated(rng, CLUSTER, OF_DATA), opt.main, "cluster.toml", (("sound.mlir", SHARDED),))


def problem_case(rng: random.Random) -> Case:
    """A cost network, to be solved."""
    return Case(("solve", "{file}", "--time-limit=5"), _mutated_json(rng, PROBLEM), cli.main, "problem.json")


def _mutated_json(rng: random.Random, text: str) -> str:
    return mutated(rng, text, OF_DATA) if rng.random() < 0.3 else mutated_json(rng, text)


CASES = {
    "ir": ir_case,
    "step": step_case,
    "plan": plan_case,
    "saved": saved_case,
    "cluster": cluster_case,
    "problem": problem_case,
}


def run(case: Case, folder: Path) -> tuple[str, str]:
    """How a case ended, and what it wrote to standard error."""
    for name, text in ((case.file, case.text), *case.others):
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    names = {"{file}": folder / case.file, "{folder}": folder}
    words = [re.sub(r"\{(file|folder)\}", lambda match: str(names[match[0]]), word) for word in case.words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            os._exit(_code_of(lambda: case.command(words)))
        ended = _wait(child)
        err.seek(0)
        return ended, err.read().decode(errors="replace")


def _code_of(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(child: int) -> str:
    deadline = time.monotonic() + PATIENCE * SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return str(code) if code >= 0 else signal.Signals(-code).name
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


def is_sound(ended: str, err: str) -> bool:
    """Whether a command treated its input as it should: took it, or said what is wrong with it."""
    return ended in ("0", "2", "3", "4") and "Traceback" not in err


def main(kind: str, seed: int, first: int, count: int) -> None:
    """Run the cases of a seed from one number on."""
    ends = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        for number in range(first, first + count):
            case = CASES[kind](random.Random(f"{kind} {seed} {number}"))
            ended, err = run(case, Path(name))
            ends[ended] += 1
            if not is_sound(ended, err):
                failure = {"number": number, "ended": ended, "words": case.words, "err": err[-2000:], "text": case.text}
                print(json.dumps(failure), flush=True)
    print(json.dumps({"ends": ends}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
