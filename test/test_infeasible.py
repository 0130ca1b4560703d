"""Programs that fit into their devices in no shardings: what is missing, what for, and which given shardings are to blame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

import bactrian
from bactrian.driver.planning.infeasible_core import with_conflict
from bactrian.driver.planning.memory_refinement import ModuleFactory
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.pipeline import run_pipeline

CLUSTER = """
hosts = 1
devices_per_host = 4
memory_gib = {}
intra_host_gb_per_s = 10
peak_tflops = {{ f32 = 0.05 }}
"""
ROWS, WIDTH = 64, 256
X = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")
WHOLE = 4 * WIDTH * WIDTH  # bytes of a weight
Loss = Callable[[Any, Any], Any]


def whole() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), P(None, None))


def plan(nbytes: float, tmp_path: Path, weights: dict[str, Any], loss: Loss) -> Any:
    """Of one stage of SGD on four devices that have so many bytes."""
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER.format(nbytes / 2**30))

    @bactrian.parallelize(mesh="data=4", num_stages=1, cluster=str(path))
    def step(weights: Any, x: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - g, weights, gradients), value

    return step.trace(weights, X).plan()


def product(weights: Any, x: Any) -> Any:
    for name in sorted(weights):
        x = jnp.tanh(x @ weights[name])
    return jnp.mean(x**2)


def weight(**keywords: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32", **keywords)


def test_not_even_the_leanest_shardings(tmp_path: Path) -> None:
    with pytest.raises(InfeasiblePlanError) as raised:
        plan(WHOLE / 4, tmp_path, {"a": weight(), "b": weight()}, product)
    error = raised.value
    needed = error.needed_bytes
    assert needed is not None and needed >= 2 * WHOLE // 4  # both weights, in four pieces each
    assert "cannot fit stage 0 into a device: it needs at least" in error.message and "are missing" in error.message
    assert "test_infeasible.py:" in error.where
    assert f"{2 * WHOLE // 4 // 1024} KiB parameters" in error.why
    assert f"the largest shard, {WHOLE // 4 // 1024}.0 KiB, is of weights['a']: tensor<256x256xf32>" in error.why
    with pytest.raises(InfeasiblePlanError) as raised:
        plan(needed - 1, tmp_path, {"a": weight(), "b": weight()}, product)
    assert ", 1 B are missing" in raised.value.message


SINE = """
module @sine attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=2]>
  func.func public @main(%x: tensor<1024xf32> {bactrian.role = "state"}) -> tensor<1024xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "update", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=1024}>} : tensor<1024xf32>
    return %y : tensor<1024xf32>
  }
}
"""


def test_what_is_needed_is_enough_to_the_byte() -> None:
    """Halves of what is read and of what is made: 4096 bytes."""
    with make_context():
        module = ir.Module.parse(SINE)
        with pytest.raises(InfeasiblePlanError) as raised:
            run_pipeline(module, "builtin.module(solve-shardings{memory-bytes=4095})", verify_contracts=False)
        assert raised.value.needed_bytes == 4096 and ", 1 B are missing" in raised.value.message
        run_pipeline(module, "builtin.module(solve-shardings{memory-bytes=4096})", verify_contracts=False)
        (stage,) = ir.ArrayAttr(module.operation.attributes["bactrian.sharding"])
        held = [ir.DictAttr(entry)["bytes"] for entry in ir.ArrayAttr(ir.DictAttr(stage)["memory_bytes"])]
        assert sum(ir.IntegerAttr(each).value for each in held) == 4096


def test_one_sharding_that_was_given_is_to_blame(tmp_path: Path) -> None:
    room = 2 * WHOLE
    assert plan(room, tmp_path, {"a": weight(), "b": weight()}, product)
    with pytest.raises(
        InfeasiblePlanError, match=r"the sharding of weights\['a'\] alone excludes every plan"
    ) as raised:
        plan(room, tmp_path, {"a": weight(sharding=whole()), "b": weight()}, product)
    assert raised.value.fix.startswith("change such a sharding, or take more devices")


def test_a_constraint_is_named_by_its_line(tmp_path: Path) -> None:
    def constrained(weights: Any, x: Any) -> Any:
        return product({**weights, "a": jax.lax.with_sharding_constraint(weights["a"], whole())}, x)

    line = constrained.__code__.co_firstlineno + 1
    with pytest.raises(
        InfeasiblePlanError, match=rf"the constraint at test_infeasible.py:{line} alone excludes every plan"
    ):
        plan(1.75 * WHOLE, tmp_path, {"a": weight(), "b": weight()}, constrained)


def test_shardings_that_exclude_each_other(tmp_path: Path) -> None:
    """Three weights of which any two can be whole; a constraint that cuts the batch has nothing to do with it."""
    room = 4.6 * WHOLE
    cut = NamedSharding(whole().mesh, P("data", None))

    def constrained(weights: Any, x: Any) -> Any:
        return product(weights, jax.lax.with_sharding_constraint(x, cut))

    given = {name: weight(sharding=whole()) for name in "abc"}
    for name in "abc":
        assert plan(room, tmp_path, {**given, name: weight()}, constrained)
    with pytest.raises(InfeasiblePlanError) as raised:
        plan(room, tmp_path, given, constrained)
    names = " and ".join(f"the sharding of weights['{name}']" for name in "abc")
    assert f"; {names} exclude every plan together, and none of them without the others" in raised.value.why


def test_shardings_are_not_to_blame_where_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(InfeasiblePlanError, match="without the specified sharding it does not fit either"):
        plan(WHOLE / 4, tmp_path, {"a": weight(sharding=whole())}, product)


def test_the_search_ends_in_time(tmp_path: Path) -> None:
    """Whatever is left when time is up is said to be no more than it is."""
    module, tried = conflicting("abc"), list[int]()
    error = InfeasiblePlanError("it does not fit", why="it is large", fix="use more")

    def fits(_again: ModuleFactory) -> bool:
        tried.append(1)
        return True

    with module.context:
        found = with_conflict(error, module.operation, fits, seconds=-1.0)
    assert len(tried) == 1  # without any
    assert "it is large; without these specified shardings, or some of them, it fits: the sharding of" in found.why


def conflicting(names: str) -> ir.Module:
    arguments = ", ".join(
        f'%{name}: tensor<8xf32> {{sdy.sharding = #sdy.sharding<@stage0, [{{}}]>}} loc("{name}")' for name in names
    )
    text = f"""sdy.mesh @stage0 = <["data"=4]>
    func.func public @main({arguments}) -> tensor<8xf32> {{ return %a : tensor<8xf32> }}"""
    return ir.Module.parse(text, make_context())
