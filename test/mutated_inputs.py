"""Gives mutated inputs to Bactrian's commands, each in a process of its own: ``mutated_inputs.py KIND SEED FIRST COUNT``.

KIND is ``ir`` (the files of ``lit_tests`` into ``bactrian-opt``), ``plan``, ``cluster`` or ``problem``. A case fails if
it says that the fault is Bactrian's (exit code 1 or 5), shows a traceback, dies of a signal, or takes longer than
`SECONDS`. The failures are printed as JSON, one a line, and then how often each exit code came.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from clusters import cluster_text
from mutations import OF_DATA, OF_IR, mutated, mutated_json

from bactrian.driver import cli, opt
from bactrian.passes.plan.schema import PLAN_FILE, LayerPlan, Plan, StagePlan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan

LIT = Path(__file__).resolve().parent.parent / "lit_tests"
SECONDS = 20.0
MEMORY_BYTES = 12 << 30
_OURS = {"%s", "--split-input-file", "--verify-diagnostics"}  # words of RUN lines that say where or how to look


@dataclasses.dataclass(frozen=True)
class Case:
    """One mutated input: what is run on it, and the file that it is in."""

    words: tuple[str, ...]
    text: str
    command: Callable[[list[str]], int]
    file: str


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
        StagePlan(0, 0, 1, (("data", 2), ("model", 1)), 10, 20, 5, 20, 40, 64, 2, 16, 16, 32, 0.5, SHARDING),
        StagePlan(1, 2, 2, (("data", 2), ("model", 1)), 10, 20, 5, 20, 40, 64, 1, 0, 16, 32, 0.25),
    ),
    layers=tuple(LayerPlan(layer, "stablehlo.add at a.py:1", (f"block{layer}",)) for layer in range(3)),
    predicted_step_seconds=0.75,
    peak_memory_bytes=1 << 20,
    options=(("epsilon", 0.1), ("strategy", "auto")),
).to_json()
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
    words = rng.choice([("explain", "{file}"), ("diff", "{file}", "{sound}"), ("diff", "{sound}", "{file}")])
    return Case(words, _mutated_json(rng, PLAN), cli.main, PLAN_FILE)


def cluster_case(rng: random.Random) -> Case:
    """A cluster, to choose shardings for."""
    pipeline = "builtin.module(func.func(sdy-populate-op-sharding-rules),solve-shardings{cluster={file} time-limit=5})"
    return Case((f"--pass-pipeline={pipeline}", "{sound}"), mutated(rng, CLUSTER, OF_DATA), opt.main, "cluster.toml")


def problem_case(rng: random.Random) -> Case:
    """A cost network, to be solved."""
    return Case(("solve", "{file}", "--time-limit=5"), _mutated_json(rng, PROBLEM), cli.main, "problem.json")


def _mutated_json(rng: random.Random, text: str) -> str:
    return mutated(rng, text, OF_DATA) if rng.random() < 0.3 else mutated_json(rng, text)


CASES = {"ir": ir_case, "plan": plan_case, "cluster": cluster_case, "problem": problem_case}
SOUND = {"plan": PLAN, "cluster": SHARDED}  # what the command reads besides


def run(case: Case, folder: Path, sound: str = "") -> tuple[str, str]:
    """How a case ended, and what it wrote to standard error."""
    file, other = folder / case.file, folder / "sound"
    file.write_text(case.text, encoding="utf-8", errors="surrogatepass")
    other.write_text(sound)
    names = {"{file}": file, "{folder}": folder, "{sound}": other}
    words = [re.sub(r"\{(file|folder|sound)\}", lambda match: str(names[match[0]]), word) for word in case.words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
    deadline = time.monotonic() + SECONDS
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
            ended, err = run(case, Path(name), SOUND.get(kind, ""))
            ends[ended] += 1
            if not is_sound(ended, err):
                failure = {"number": number, "ended": ended, "words": case.words, "err": err[-2000:], "text": case.text}
                print(json.dumps(failure), flush=True)
    print(json.dumps({"ends": ends}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
