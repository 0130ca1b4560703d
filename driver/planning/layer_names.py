"""Names of layers for people: the user's modules and lines that they were made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from jaxlib.mlir import ir

from bactrian.driver.planning.predictions import PlacedOp
from bactrian.passes.frame.location import name_stack, user_place
from bactrian.passes.ir.attributes import BACKWARD, FORWARD
from bactrian.passes.plan.schema import LayerPlan

_WRAPPER = re.compile(r"^(?!jit\()[\w.-]+\((.*)\)$")


def _module_of(stack: str) -> str:
    """The user's module in a name stack: ``jit(step)/jvp(GPT)/block_1/attn/dot_general`` is in ``block_1``."""
    names: list[str] = []
    for part in stack.split("/")[:-1]:
        while match := _WRAPPER.match(part):
            part = match.group(1)
        if (
            part
            and "(" not in part
            and "->" not in part  # the text of an einsum
            and part not in ("checkpoint", "rematted_computation", "closed_call", "while", "body")
        ):
            names.append(part)
    return names[1] if len(names) > 1 else names[0] if names else ""


def name_layers(ops: Sequence[PlacedOp], num_layers: int, *, is_timed: bool) -> tuple[LayerPlan, ...]:
    """Each layer's modules, the user's line of its first op that does arithmetic, and the seconds of a microbatch.

    Args:
        ops: with their layers.
        num_layers: how many layers there are.
        is_timed: whether anything is known of the speed of the devices.
    """
    seconds = [0.0] * num_layers
    first: dict[int, str] = {}
    modules: dict[int, dict[str, None]] = {layer: {} for layer in range(num_layers)}
    for placed in ops:
        if placed.phase in (FORWARD, BACKWARD):
            seconds[placed.layer or 0] += placed.seconds
        if placed.phase != "forward" or placed.flops == 0:
            continue
        op, layer = placed.op, placed.layer or 0
        if layer not in first:
            first[layer] = _first_op(op)
        name = _module_of(name_stack(op.location))
        if name:
            modules[layer][name] = None
    return tuple(
        LayerPlan(layer, first.get(layer, ""), tuple(modules[layer]), seconds[layer] if is_timed else None)
        for layer in range(num_layers)
    )


def _first_op(op: ir.Operation) -> str:
    """``stablehlo.dot_general at train.py:12``: without the folder, so that plans do not depend on it."""
    place = user_place(op.location)
    return op.name if place is None else f"{op.name} at {PurePath(place.file).name}:{place.line}"
