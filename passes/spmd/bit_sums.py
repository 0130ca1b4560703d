"""Values of which each element is one device's, for all devices: the sum of their bits.

Sums of floats would not do: XLA's for CPUs give 0.0 where all devices add -0.0 (seen in jaxlib 0.10.2).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import converted

Step = Callable[[ir.Value], ir.Value]


def sum_of_bits(value: ir.Value, own: Step, add_up: Step) -> ir.Value:
    """What each element's device has.

    Args:
        value: of this device.
        own: of integers in the value's shape those that are this device's to give, and zeros elsewhere; perhaps in another
            shape.
        add_up: integers over devices.
    """
    element = ir.RankedTensorType(value.type).element_type
    if isinstance(element, ir.ComplexType):
        halves = [_with_element(f"stablehlo.{name}", value, element.element_type) for name in ("real", "imag")]
        parts = [sum_of_bits(half, own, add_up) for half in halves]
        type_ = ir.RankedTensorType.get(ir.RankedTensorType(parts[0].type).shape, element)
        return ir.Operation.create("stablehlo.complex", results=[type_], operands=parts).results[0]
    if str(element) == "i1":
        return converted(add_up(own(converted(value, ir.IntegerType.get_unsigned(8)))), element)
    if isinstance(element, ir.FloatType):
        bits = _with_element("stablehlo.bitcast_convert", value, ir.IntegerType.get_signless(element.width))
        return _with_element("stablehlo.bitcast_convert", add_up(own(bits)), element)
    return add_up(own(value))


def _with_element(name: str, value: ir.Value, element: ir.Type) -> ir.Value:
    type_ = ir.RankedTensorType.get(ir.RankedTensorType(value.type).shape, element)
    return ir.Operation.create(name, results=[type_], operands=[value]).results[0]
