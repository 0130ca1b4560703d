"""From MLIR locations to the user's lines and name stacks."""

from __future__ import annotations

import time

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.location import is_user_file, name_stack, user_location

CASES = [
    ('"jit(f)/tanh"(callsite("layer"("model.py":4:11) at "f"("train.py":9:3)))', "model.py:4", "jit(f)/tanh"),
    ('"jit(f)/a"(callsite("g"("/e/site-packages/flax/x.py":1:1) at "f"("t.py":9:3)))', "t.py:9", "jit(f)/a"),
    ('"closed_call:"("while/body/closed_call"("f"("t.py":2:3)))', "t.py:2", "while/body/closed_call"),
    ('"while:"("while")', "", "while"),
    ("\"state['w']\"", "", "state['w']"),
    ('"t.py":7:1', "t.py:7", ""),
    ('fused["t.py":7:1, "jit(f)/b"("u.py":8:1)]', "t.py:7", "jit(f)/b"),
    ('callsite("tanh"("a.py":1:1) at "jit(f)"("b.py":2:2))', "a.py:1", "tanh"),
    ('"x"("/e/site-packages/jax/only.py":5:1)', "/e/site-packages/jax/only.py:5", "x"),
    ("unknown", "", ""),
]


@pytest.mark.parametrize(("text", "place", "name"), CASES)
def test_places_and_names(text: str, place: str, name: str) -> None:
    with make_context():
        module = ir.Module.parse(f"module {{\n  func.func private @f() loc({text})\n}}")
        location = module.body.operations[0].location
        assert (user_location(location), name_stack(location)) == (place, name)


def test_which_files_are_the_users() -> None:
    import dataclasses

    import bactrian.passes.frame.errors as own

    assert is_user_file("/home/me/train.py")
    assert is_user_file("-")
    assert not is_user_file(own.__file__)
    assert not is_user_file(dataclasses.__file__)
    assert not is_user_file("/opt/v/lib/python3.12/site-packages/optax/_src/base.py")


def test_a_large_module_takes_no_time() -> None:
    lines = "".join(
        f'  %{i} = stablehlo.tanh %arg0 : tensor<f32> loc("jit(f)/block_{i}/tanh"(callsite("g"("a.py":{i}:1) at '
        f'callsite("h"("/e/site-packages/flax/m.py":{i}:2) at "f"("b.py":3:4)))))\n'
        for i in range(1, 17001)
    )
    with make_context():
        module = ir.Module.parse(
            f"func.func @main(%arg0: tensor<f32>) -> tensor<f32> {{\n{lines}  return %1 : tensor<f32>\n}}"
        )
        ops = list(module.body.operations[0].regions[0].blocks[0].operations)
        start = time.process_time()
        for op in ops:
            user_location(op.location)
            name_stack(op.location)
        assert time.process_time() - start < 1.0  # 0.1 s on a laptop; a shared machine may be slower
