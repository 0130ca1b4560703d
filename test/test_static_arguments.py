"""Arguments that are no data: ``static_argnums`` and ``static_argnames`` as of ``jax.jit``, and settings in modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest

import bactrian
from bactrian.passes.frame.errors import ConfigError, ProgramError

W, X = np.full((4, 4), 0.1, np.float32), np.ones((8, 4), np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    scale: float = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Settings:
    """A config that is a pytree of Python numbers, as one of ``flax.struct`` is."""

    layers: int = 2


def update(w: Any, x: Any, layers: int = 1, scale: float = 1.0) -> Any:
    def loss(w: Any) -> Any:
        h = x
        for _ in range(layers):
            h = jnp.tanh(h @ w)
        return jnp.mean(h**2) * scale

    value, g = bactrian.value_and_grad(loss)(w)
    return w - g, value


def by_config(w: Any, x: Any, config: Any) -> Any:
    return update(w, x, config.layers, config.scale)


def by_keyword(w: Any, x: Any, *, double: bool = False) -> Any:
    return update(w, x, 2 if double else 1)


@pytest.mark.parametrize(
    ("step", "options", "args", "kwargs"),
    [
        (update, {"static_argnums": 2}, (3,), {}),
        (update, {"static_argnums": -2}, (3, jnp.float32(2.0)), {}),
        (update, {"static_argnames": "layers"}, (3,), {}),
        (update, {"static_argnames": ["layers", "scale"]}, (), {"scale": 2.0, "layers": 3}),
        (update, {"static_argnums": (2,)}, (3, jnp.float32(2.0)), {}),
        (by_config, {"static_argnums": 2}, (Config(),), {}),
        (by_config, {"static_argnames": ("config",)}, (Config(3, 2.0),), {}),
        (by_keyword, {"static_argnames": "double"}, (), {"double": True}),
        (lambda w, x, *rest: update(w, x, rest[1]), {"static_argnums": 3}, (None, 2), {}),
        (lambda w, x, **rest: update(w, x, **rest), {"static_argnames": "layers"}, (), {"layers": 2}),
    ],
)
def test_a_static_argument_is_a_python_value(step: Any, options: Any, args: Any, kwargs: Any) -> None:
    made = bactrian.parallelize(step, num_stages=1, num_microbatches=2, **options)
    jitted = jax.jit(step, **options)
    expected = jitted(W, X, *args, **kwargs)
    numerics.assert_equal_step(made(W, X, *args, **kwargs), expected)
    numerics.assert_equal_step(made.reference(W, X, *args, **kwargs), expected)


def test_other_values_are_traced_again_and_equal_ones_are_not() -> None:
    counts = list[Any]()

    @bactrian.parallelize(num_stages=1, static_argnames="mode")
    def step(w: Any, x: Any, mode: Any) -> Any:
        counts.append(mode)
        return update(w, x * 2 if mode is True else x)

    w, _ = step(W, X, True)
    for mode in (True, 1, 1, True):
        w, _ = step(w, X, mode=mode)
    assert counts == [True, 1] and [type(each) for each in counts] == [bool, int]


def test_fingerprints_tell_values_apart() -> None:
    step = bactrian.parallelize(by_config, num_stages=1, static_argnums=2)
    one, two, three = (step.trace(W, X, config).fingerprint for config in (Config(), Config(), Config(scale=0.25)))
    assert one == two != three


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"static_argnums": 4}, "static_argnums has 4, but the step has 4 positional parameters"),
        ({"static_argnums": -5}, "static_argnums has -5"),
        (
            {"static_argnames": "layer"},
            "static_argnames has 'layer', but the step has the parameters w, x, layers, scale",
        ),
        ({"static_argnums": "2"}, "static_argnums is '2'"),
        ({"static_argnames": 2}, "static_argnames is 2"),
    ],
)
def test_what_is_no_parameter_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bactrian.parallelize(update, **options)


def test_the_batch_is_not_static() -> None:
    step = bactrian.parallelize(update, static_argnums=1)
    with pytest.raises(ConfigError, match="argument 1 is static, and in batch_argnums"):
        step.trace(W, 3)


@pytest.mark.parametrize("value", [[2], W, {"layers": 2}])
def test_what_can_not_be_hashed_is_refused(value: Any) -> None:
    step = bactrian.parallelize(by_config, static_argnums=2)
    with pytest.raises(ProgramError, match=r"the static argument .* can't be hashed") as error:
        step.trace(W, X, value)
    assert "frozen dataclass" in error.value.fix


def flag(w: Any, x: Any, train: Any = True) -> Any:
    return update(w, x * 2 if train else x)


def settings(w: Any, x: Any, config: Any) -> Any:
    return update(w, x, config.layers)


def width(w: Any, x: Any, size: int) -> Any:
    return update(w, x + jnp.zeros(size))


def both(w: Any, x: Any, train: bool, twice: bool) -> Any:
    return update(w, x * 2 if bactrian.stage_boundary(jnp.asarray(train) & twice) else x)


@pytest.mark.parametrize(
    ("step", "args", "kwargs", "what", "name"),
    [
        (flag, (), {"train": True}, "train, a Python bool", "'train'"),
        (flag, (False,), {}, "train, a Python bool", "'train'"),
        (settings, (Settings(),), {}, "config.layers, a Python int", "'config'"),
        (width, (4,), {}, "size, a Python int", "'size'"),
        (both, (True, False), {}, "train, a Python bool, and twice, a Python bool", "('train', 'twice')"),
    ],
)
def test_the_error_of_a_python_number_names_static_argnames(
    step: Any, args: Any, kwargs: Any, what: str, name: str
) -> None:
    with pytest.raises(ProgramError, match=f"can't be traced with an abstract value of {what}\n") as error:
        bactrian.parallelize(step).trace(W, X, *args, **kwargs)
    assert f"static_argnames={name}" in error.value.fix
    assert "test_static_arguments.py" in error.value.where


class Dropped(eqx.Module):
    """Layers with a number, a function and a text beside their arrays."""

    linear: eqx.nn.Linear
    drop: eqx.nn.Dropout
    activation: Any = jax.nn.relu
    mode: str = "same"
    scale: float = 0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.mode == "same"
        h = self.activation(jax.vmap(self.linear)(x))
        return self.drop(h, inference=True) * (self.scale if self.scale < 1 else 1.0)


def test_numbers_in_an_equinox_module_are_settings() -> None:
    traces = list[int]()

    @bactrian.parallelize(num_stages=1, num_microbatches=2)
    def step(model: Any, x: Any) -> Any:
        traces.append(1)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        loss, g = bactrian.value_and_grad(lambda p: jnp.mean(eqx.combine(p, static)(x) ** 2))(params)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -g, g)), loss

    model = Dropped(eqx.nn.Linear(4, 4, key=jax.random.key(0)), eqx.nn.Dropout(0.25))
    numerics.assert_equal_step(_arrays(step(model, X)), _arrays(step.reference(model, X)))
    state, _ = step(model, X)
    assert (state.scale, state.drop.p, state.mode, state.activation) == (0.5, 0.25, "same", jax.nn.relu)
    state, _ = step(state, X)
    assert len(traces) == 1
    there = bactrian.put(bactrian.gather(state), step)
    assert there.scale == 0.5 and isinstance(there.linear.weight, bactrian.DistributedArray)
    step(eqx.tree_at(lambda m: m.scale, there, 0.75), X)
    assert len(traces) == 2


def _arrays(result: Any) -> Any:
    return eqx.filter(bactrian.gather(result), eqx.is_array)
