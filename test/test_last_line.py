"""The last line of what an exception prints says what is wrong, also where JAX adds a note about its own frames."""

from __future__ import annotations

import traceback
from typing import Any

import jax
import numpy as np
import pytest

import bactrian
from bactrian.driver.launch.user_script import describe_failure
from bactrian.runtime import rank_lifecycle


def model(w: Any) -> Any:
    raise ValueError("no such layer")


def test_an_exception_while_tracing() -> None:
    @bactrian.parallelize(batch_argnums=())
    def step(w: Any) -> Any:
        value, gradient = bactrian.value_and_grad(model)(w)
        return w - gradient, value

    with pytest.raises(ValueError) as caught:
        step(np.ones(3, np.float32))
    assert "".join(traceback.format_exception(caught.value)).endswith("\nValueError: no such layer\n")


def test_an_exception_of_a_script() -> None:
    with pytest.raises(ValueError) as caught:
        jax.jit(model)(1.0)
    caught.value.add_note("the user's own note")
    assert any("JAX" in note for note in caught.value.__notes__), "JAX adds none any more"
    text = describe_failure(caught.value, __file__)
    assert text.endswith("\nValueError: no such layer\nthe user's own note\n") and "test_last_line.py" in text


def test_an_exception_under_mpirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    monkeypatch.setattr(rank_lifecycle, "abort", codes.append)
    with pytest.raises(ValueError) as caught:
        jax.jit(model)(1.0)
    rank_lifecycle._on_exception(ValueError, caught.value, caught.value.__traceback__)
    assert capsys.readouterr().err.endswith("\nValueError: no such layer\n") and codes == [1]
