"""`bactrian explain --value`: the saved folder, stages of a pipeline, applied plans, what is missing, what is printed."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import FAST
from commands import bactrian

from bactrian.driver import cli
from bactrian.driver.commands import python_target
from bactrian.driver.planning.explain_value import explain_saved
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import CPU_HOST
from bactrian.passes.plan.schema import Plan
from bactrian.passes.sharding.explain import Explanation

STEP = """
import jax, jax.numpy as jnp
import bactrian

def loss(params, batch):
    for name in ("first", "second"):
        with jax.named_scope(name):
            batch = batch + jax.nn.gelu(batch @ params["a"]) @ params[name]
    return jnp.square(batch).mean()

@bactrian.parallelize(num_microbatches=2, num_stages=1)
def step(params, batch):
    value, gradients = bactrian.value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

shape = jax.ShapeDtypeStruct
example_args = (
    {"a": shape((64, 256), jnp.float32), "first": shape((256, 64), jnp.float32), "second": shape((256, 64), jnp.float32)},
    shape((64, 64), jnp.float32),
)
"""
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Save:
    """Writes a plan of `STEP`; the cluster's file is gone afterwards."""

    def write(*options: str, mesh: str = "data=2,model=4", host: bool = False) -> Path:
        (tmp_path / "some.toml").write_text(FAST)
        (tmp_path / "explained_step.py").write_text(STEP)
        command = ["plan", f"{tmp_path / 'explained_step.py'}:step", "--save", str(tmp_path / "plan"), *options]
        cluster = [] if host else ["--cluster", str(tmp_path / "some.toml")]
        assert cli.main([*command, "--mesh", mesh, *cluster]) == 0
        (tmp_path / "some.toml").unlink()
        capsys.readouterr()
        return tmp_path / "plan"

    return write


def check_chosen(found: Explanation, plan: Plan, stage: int) -> None:
    """The row of the chosen sharding is what the plan says, to the last bit."""
    sharding = plan.stages[stage].sharding
    assert sharding is not None
    (chosen,) = (row for row in found.alternatives if row.is_chosen)
    assert found.seconds == chosen.seconds == sharding.seconds
    assert chosen.bound_seconds == sharding.bound_seconds
    assert chosen.communication_seconds == sharding.communication_seconds
    assert chosen.memory == sharding.memory_bytes
    assert chosen.sent_bytes == sharding.sent_bytes
    written = dict(sharding.shardings).get(found.name, found.sharding)
    assert written == found.sharding or any(f"the stage gets it as {written}:" in note for note in found.notes)


def test_the_chosen_sharding_costs_what_the_plan_says(save: Save) -> None:
    folder = save()
    plan = Plan.load(folder)
    for name in ("params['a']", "batch", "jvp(first)/dot_general@1"):
        found = explain_saved(folder, name)
        check_chosen(found, plan, 0)
        assert found.stage is None and found.limit_bytes == 1 << 30
        assert found.seconds == min(row.seconds for row in found.alternatives if row.seconds is not None)
    assert found.place == "explained_step.py:8" and found.origin == "stablehlo.dot_general, forward"


def test_a_step_that_was_planned_here(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    """`planned.explain` is the same, and prints the same."""
    folder = save()
    path = folder.parent / "again" / "explained_step.py"
    path.parent.mkdir()
    path.write_text(STEP.replace("num_stages=1)", 'num_stages=1, mesh="data=2,model=4")'))
    (folder.parent / "some.toml").write_text(FAST)
    loaded = runpy.run_path(str(path))
    found = loaded["step"].trace(*loaded["example_args"]).plan(folder.parent / "some.toml").explain("params['a']")
    assert found == explain_saved(folder, "params['a']")
    found.show()
    assert "params['a']" in capsys.readouterr().out
    assert "params[" in found._repr_html_()


def test_without_a_cluster_the_host_is_one(save: Save) -> None:
    folder = save(host=True)
    found = explain_saved(folder, "params['a']")
    check_chosen(found, Plan.load(folder), 0)
    assert found.limit_bytes == CPU_HOST.memory_bytes


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_stages_of_a_pipeline(save: Save, schedule: str) -> None:
    folder = save("--num-stages", "2", "--schedule", schedule, mesh="data=4")
    plan = Plan.load(folder)
    for name, stage in (("params['first']", 0), ("params['second']", 1), ("jvp(second)/dot_general@1", 1)):
        found = explain_saved(folder, name)
        assert found.stage == stage
        check_chosen(found, plan, stage)
    with pytest.raises(
        ConfigError, match=r"is ambiguous: it matches 2 values\n(.*\n)*.*say which stage with --stage: 0, 1"
    ):
        explain_saved(folder, "params['a']")
    for stage in (0, 1):
        check_chosen(explain_saved(folder, "params['a']", stage), plan, stage)
    with pytest.raises(ConfigError, match=r"no value is called \"params\['second'\]\" in stage 0"):
        explain_saved(folder, "params['second']", 0)
    with pytest.raises(ConfigError, match="there is no stage 2"):
        explain_saved(folder, "params['second']", 2)


def test_a_plan_that_was_applied_gives_shardings(tmp_path: Path, save: Save) -> None:
    folder = save()
    plan = Plan.load(folder)
    (tmp_path / "some.toml").write_text(FAST)
    step = python_target.load(f"{tmp_path / 'explained_step.py'}:step", "")
    arguments = python_target.load(f"{tmp_path / 'explained_step.py'}:example_args", "")
    made = step.with_options(mesh="data=2,model=4", cluster=str(tmp_path / "some.toml"), plan=plan)
    made.trace(*arguments).plan().save(tmp_path / "again")
    found = explain_saved(tmp_path / "again", "params['a']")
    assert (found.reason, found.given_by) == ("given", "the plan that was applied")
    assert found.sharding == explain_saved(folder, "params['a']").sharding
    assert explain_saved(tmp_path / "again", "jvp(first)/dot_general@1").reason == "cheapest"


def test_folders_that_lack_something(tmp_path: Path, save: Save) -> None:
    folder = save()
    text = (folder / "plan.json").read_text()
    plan = json.loads(text)
    shardings = plan["stages"][0]["sharding"]["shardings"]
    shardings["params['a']"] = "-,-" if shardings["params['a']"] != "-,-" else "data,-"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"params\['a'\] has another sharding: the plan was changed"):
        explain_saved(folder, "batch")
    plan = json.loads(text)
    plan["stages"][0]["sharding"]["seconds"] *= 2
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"solved again, a step takes .* s, not .*\n.*--time-limit"):
        explain_saved(folder, "batch")  # it is not proved any more
    plan = json.loads(text) | {"fingerprint": "0" * 64}
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="belong to different programs"):
        explain_saved(folder, "batch")
    (folder / "plan.json").write_text(text)
    plan = json.loads(text)
    plan["stages"][0]["sharding"]["limit_bytes"] = None
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="does not say what its shardings were chosen for"):
        explain_saved(folder, "batch")
    (folder / "plan.json").write_text(text)
    unsolved = (folder / "solve.mlir").read_text()
    (folder / "solve.mlir").write_text("module {}")
    with pytest.raises(ConfigError, match="has no record of what the shardings were chosen for"):
        explain_saved(folder, "batch")
    (folder / "solve.mlir").write_text(unsolved.replace('bactrian.role = "batch"', 'bactrian.role = "rows"'))
    with pytest.raises(
        ConfigError, match=r"cannot read .*solve\.mlir\n.*bactrian\.role is 'rows', must be one of state"
    ):
        explain_saved(folder, "batch")
    (folder / "solve.mlir").write_text(unsolved.replace('strategy = "auto"', "strategy = 3 : i64"))
    with pytest.raises(ConfigError, match=r"strategy in bactrian\.solve is 3 : i64, must be a string"):
        explain_saved(folder, "batch")
    (folder / "solve.mlir").write_text(unsolved[: len(unsolved) // 2])
    with pytest.raises(ConfigError, match=r"cannot read .*solve\.mlir"):
        explain_saved(folder, "batch")
    (folder / "solve.mlir").unlink()
    with pytest.raises(ConfigError, match=r"has no solve.mlir\n(.*\n)*.*--mesh data=2,model=4 --save"):
        explain_saved(folder, "batch")
    command = ["plan", f"{tmp_path / 'explained_step.py'}:step", "--save", str(folder)]
    (folder / "solve.mlir").write_text(unsolved)
    assert cli.main(command) == 0
    assert not (folder / "solve.mlir").exists()  # it belonged to the plan before
    with pytest.raises(ConfigError, match="has no shardings to explain"):
        explain_saved(folder, "batch")


def test_the_command(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save()
    found = set[tuple[str, str]]()
    for seed in range(2):
        both = list[str]()
        for option in ((), ("--json",)):
            environment = {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed)}
            done = bactrian("explain", folder, "--value", "params['a']", *option, **environment)
            assert done.returncode == 0, done.stderr
            both.append(done.stdout)
        found.add((both[0], both[1]))
    ((table, text),) = found
    data = json.loads(text)
    assert max(map(len, table.splitlines())) <= 100
    assert table.startswith("params['a']  f32[64,256]\n")
    assert f"→ {data['sharding']}" in table and data["reason"] == "cheapest"
    assert len(data["alternatives"]) == 9 and set(data["mesh"]) == {"data", "model"}
    assert cli.main(["explain", str(folder), "--value", "nothing like it"]) == 3
    assert "no value is called 'nothing like it'" in capsys.readouterr().err
    for option in (["--json"], ["--stage", "0"]):
        assert cli.main(["explain", str(folder), *option]) == 3
        assert "needs a value" in capsys.readouterr().err
    assert cli.main(["explain", str(folder)]) == 0
    with pytest.raises(SystemExit):
        cli.main(["explain", str(folder), "--value", "a", "--stage", "-1"])
