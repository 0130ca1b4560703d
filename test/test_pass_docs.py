"""The example in each pass's docstring is true: the pass turns its first module into its second."""

from __future__ import annotations

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame import documentation, pipeline, registry
from bactrian.passes.frame.context import make_context


@pytest.mark.parametrize("name", registry.PASSES)
def test_the_example_is_true(name: str) -> None:
    cls = registry.load(name)
    blocks = documentation.example(cls)
    assert blocks is not None, f"the docstring of {cls.__name__} needs two ```mlir blocks, before and after"
    with make_context():
        module, expected = (ir.Module.parse(block) for block in blocks)
        pipeline.run_pipeline(module, [cls()], verify_contracts=False)  # the examples are no whole programs
        assert str(module) == str(expected)
