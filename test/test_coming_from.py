"""Both sides of every program in ``docs/coming-from.md`` run, and train alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import bactrian

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming-from.md"
SECTIONS = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
PROGRAMS = {title: re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL) for title, text in SECTIONS}

ROWS, WIDTH, CLASSES = 8, 6, 5
_RANDOM = np.random.default_rng(0)
PAIRS = [
    (_RANDOM.standard_normal((ROWS, WIDTH), np.float32), _RANDOM.standard_normal((ROWS, CLASSES), np.float32))
    for _ in range(3)
]
LABELLED = [{"x": x, "y": y.argmax(-1)} for x, y in PAIRS]
TOKENS = [{"input_ids": _RANDOM.integers(0, CLASSES, (ROWS, 4))} for _ in range(3)]


def _params() -> Any:
    a, b = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(a, (WIDTH, 8)) / 3, "b": jax.random.normal(b, (8, CLASSES)) / 3}


def _predict(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def _loss(params: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((_predict(params, x) - y) ** 2)


def _with_jax() -> dict[str, Any]:
    """Everything that programs of plain JAX name."""
    return {"params": _params(), "loss_fn": _loss, "batches": PAIRS, "partial": partial, "optimizer": optax.adam(0.05)}


def _pmap() -> dict[str, Any]:
    def replicate(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tree)

    def shard(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), tree)

    return _with_jax() | {"replicate": replicate, "shard": shard}


def _pjit() -> dict[str, Any]:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    replicated, by_rows = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    return _with_jax() | {"replicated": replicated, "by_rows": by_rows}


def _linen() -> dict[str, Any]:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(CLASSES)(jnp.tanh(linen.Dense(8)(x)))

    net, saved = Net(), list[Any]()
    params = net.init(jax.random.key(0), PAIRS[0][0])["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(0.05))
    return {"state": state, "batches": LABELLED, "batch": LABELLED[0], "save": saved.append}


def _nnx() -> dict[str, Any]:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.norm = nnx.Linear(WIDTH, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
            self.b = nnx.Linear(8, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(jnp.tanh(self.norm(self.a(x))))

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    return {"nnx": nnx, "model": model, "optimizer": optimizer, "loss_fn": loss, "batches": PAIRS}


def _equinox() -> dict[str, Any]:
    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

    model, optimizer = eqx.nn.MLP(WIDTH, CLASSES, 8, 1, key=jax.random.key(0)), optax.adam(0.05)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    names = {"model": model, "opt_state": opt_state, "optimizer": optimizer}
    return names | {"eqx": eqx, "loss_fn": loss, "batches": PAIRS}


def _haiku() -> dict[str, Any]:
    """What the program names of Haiku, in plain JAX: a transformed function is a pair of functions."""
    transformed = SimpleNamespace(init=lambda key, x: _params(), apply=_predict)
    hk = SimpleNamespace(transform=lambda forward: transformed, without_apply_rng=lambda each: each)
    return _with_jax() | {"hk": hk, "forward": None}


def _transformers() -> dict[str, Any]:
    """A language model with the call of a Flax model of transformers 4, in plain JAX."""

    class Lm:
        params = _params() | {"embed": jnp.eye(CLASSES, WIDTH)}

        def __call__(self, input_ids: Any, params: Any, train: bool) -> Any:
            assert not train
            return SimpleNamespace(logits=_predict(params, params["embed"][input_ids]))

    names = _pmap() | {"model": Lm(), "batches": TOKENS, "TrainState": TrainState}
    return names | {"jax_utils": SimpleNamespace(replicate=names["replicate"])}


SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "`jax.jit`": _with_jax,
    "`jax.pmap`": _pmap,
    "`pjit`: `jax.jit` with shardings": _pjit,
    "Flax: `linen` and `TrainState`": _linen,
    "Flax: `nnx`": _nnx,
    "Equinox": _equinox,
    "Haiku": _haiku,
    "HuggingFace transformers": _transformers,
}


def test_every_program_is_run() -> None:
    assert {title for title, programs in PROGRAMS.items() if programs} == SETUPS.keys()


def _side(program: str, sign: str) -> str:
    """One side of a program: its unchanged lines and those with ``sign``."""
    return "\n".join(line[1:] for line in program.splitlines() if not line or line[0] in f" {sign}")


def _before(program: str) -> str:
    return _side(program, "-")


def _after(program: str) -> str:
    return _side(program, "+")


def _stacked(program: str) -> str:
    """The changed side of a program, with its decorator on top of the old one."""
    old, new, rest = program.split("\n", 2)
    return _side(f"{new}\n+{old[1:]}\n{rest}", "+")


def _run(title: str, side: Callable[[str], str]) -> list[float]:
    """The loss after each program of a section, or its accuracy."""
    names = SETUPS[title]() | {"jax": jax, "jnp": jnp, "optax": optax, "bactrian": bactrian}
    found: list[float] = []
    for program in PROGRAMS[title]:
        exec(compile(side(program), f"{PAGE.name}: {title}", "exec"), names)
        loss = names.get("accuracy", names.get("loss", names.get("metrics", {}).get("loss")))
        found.append(float(jnp.ravel(loss)[0]))
    return found


@pytest.mark.parametrize("title", SETUPS)
def test_both_sides_train_alike(title: str) -> None:
    before, after = _run(title, _before), _run(title, _after)
    np.testing.assert_allclose(after, before, rtol=1e-4)


@pytest.mark.parametrize("title", ["`jax.jit`", "Flax: `nnx`", "Equinox"])
def test_the_old_decorator_may_stay_below(title: str) -> None:
    np.testing.assert_allclose(_run(title, _stacked), _run(title, _before), rtol=1e-4)
