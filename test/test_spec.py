"""How a tensor is sharded, as plain data: text, shards, and the IR's form of it."""

from __future__ import annotations

import pytest
from jaxlib.mlir import ir

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.meshes import sharding_attribute, spec_of, spec_or_replicated
from bactrian.passes.machine.spec import UNSHARDED, Spec, axes_text, num_devices, parse_axes

SIZES = {"data": 2, "model": 4}
SPECS = {
    "": Spec(),
    "-,-": Spec(((), ())),
    "data,-": Spec((("data",), ())),
    "-,model+data": Spec(((), ("model", "data"))),
    "model,- unreduced=data": Spec((("model",), ()), ("data",)),
    "unreduced=data+model": Spec((), ("data", "model")),
}


@pytest.mark.parametrize(("text", "spec"), SPECS.items())
def test_text_and_ir_say_the_same(text: str, spec: Spec) -> None:
    assert str(spec) == text
    assert Spec.parse(text) == spec
    with make_context(), ir.Location.unknown():
        assert spec_of(sharding_attribute(spec, "stage0")) == spec


def test_the_ir_says_it_as_shardy_does() -> None:
    with make_context(), ir.Location.unknown():
        text = str(sharding_attribute(Spec((("model",), ()), ("data",)), "mesh"))
        assert text == '#sdy.sharding<@mesh, [{"model"}, {}], unreduced={"data"}>'
        type_ = ir.RankedTensorType.get([4, 2], ir.F32Type.get())
        assert spec_or_replicated(None, type_) == Spec.replicated(2) == Spec(((), ()))


def test_shards() -> None:
    spec = Spec((("data", "model"), (), ("data",)))
    assert spec.axes == ("data", "model", "data")
    assert spec.num_shards(SIZES) == 16
    assert spec.local_shape((16, 3, 5), SIZES) == (2, 3, 3)
    assert spec.with_dim(0, ["model"]) == Spec((("model",), (), ("data",)))
    assert [each.is_replicated for each in (UNSHARDED, Spec(((), ())), Spec((("data",),)), Spec((), ("data",)))] == [
        True, True, False, False
    ]  # fmt: skip


def test_mesh_axes() -> None:
    axes = parse_axes("data=2, model=4")
    assert axes == (("data", 2), ("model", 4))
    assert axes_text(axes) == "data=2,model=4"
    assert (num_devices(axes), num_devices(())) == (8, 1)
    with pytest.raises(ConfigError, match="two axes of one name"):
        parse_axes("data=2,data=4")
