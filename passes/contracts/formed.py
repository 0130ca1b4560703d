"""The contract of attributes: each ``bactrian.*`` attribute stands where it means something, in the form that it is read in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.frame.fields import MAX_COUNT
from bactrian.passes.frame.location import Locatable
from bactrian.passes.ir.attributes import (
    ACCUMULATE,
    ACCUMULATOR,
    ALIAS,
    ARGUMENT,
    COUNTER,
    FIRST_DEVICES,
    FIRST_LAYERS,
    FUSED,
    LAYER,
    LOOPED_MICROBATCHES,
    MICROBATCH_INDEX,
    NUM_LAYERS,
    NUM_MICROBATCHES,
    NUM_STAGES,
    ORDER,
    PARTIAL,
    PHASE,
    PHASES,
    PINNED_STAGES,
    REMAT,
    RESULT,
    ROLE,
    ROUND,
    ROWS,
    SCHEDULE,
    SENT_BYTES,
    SHARDING_ESTIMATES,
    SOLVE,
    STAGE,
    STAGE_SHARDINGS,
    UPDATES,
    argument_attributes,
    integer_attribute,
    result_attributes,
)
from bactrian.passes.ir.meshes import mesh_name
from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.plan.remat_words import WORDS

_PREFIX = "bactrian."


@dataclass(frozen=True)
class _Form:
    """What an attribute may be: in words, and as a test."""

    allowed: str
    fits: Callable[[ir.Attribute], bool]


def _integer(first: int, last: int) -> _Form:
    def fits(attribute: ir.Attribute) -> bool:
        return (
            isinstance(attribute, ir.IntegerAttr)
            and attribute.type == ir.IntegerType.get_signless(64)
            and first <= attribute.value <= last
        )

    return _Form(f"an integer from {first} to {last} (i64)", fits)


def _word(words: Iterable[str]) -> _Form:
    allowed = tuple(words)
    return _Form(
        f"one of {', '.join(allowed)}",
        lambda attribute: isinstance(attribute, ir.StringAttr) and attribute.value in allowed,
    )


def _list(of: _Form, what: str) -> _Form:
    return _Form(what, lambda attribute: isinstance(attribute, ir.ArrayAttr) and all(map(of.fits, attribute)))


def _kind(kind: type[ir.Attribute], allowed: str) -> _Form:
    return _Form(allowed, lambda attribute: isinstance(attribute, kind))


def _is_stage_shardings(attribute: ir.Attribute) -> bool:
    return isinstance(attribute, ir.DictAttr) and all(
        sdy.TensorShardingAttr.isinstance(item.attr) and mesh_name(item.attr) == item.name for item in attribute
    )


_COUNT = _integer(1, MAX_COUNT)
_NUMBER = _integer(0, MAX_COUNT - 1)
_UNIT = _kind(ir.UnitAttr, "without a value")
_TEXT = _kind(ir.StringAttr, "a string")
_DICTIONARY = _kind(ir.DictAttr, "a dictionary")

_OF_MODULE: dict[str, _Form] = {
    NUM_MICROBATCHES: _COUNT,
    NUM_LAYERS: _COUNT,
    NUM_STAGES: _COUNT,
    LOOPED_MICROBATCHES: _COUNT,
    SCHEDULE: _TEXT,
    FIRST_LAYERS: _kind(ir.DenseI64ArrayAttr, "an array of i64, the first layer of each stage"),
    FIRST_DEVICES: _kind(ir.DenseI64ArrayAttr, "an array of i64, the first device of each stage"),
    REMAT: _list(_word(WORDS), f"a list of {', '.join(WORDS)}, one for each layer"),
    ORDER: _list(_list(_TEXT, ""), "a list of strings for each stage"),
    SHARDING_ESTIMATES: _list(_DICTIONARY, "a list of a dictionary for each stage"),
    SENT_BYTES: _DICTIONARY,
    SOLVE: _DICTIONARY,
}
_OF_ARGUMENT: dict[str, _Form] = {
    ROLE: _TEXT,
    PINNED_STAGES: _list(_NUMBER, "a list of stages"),
    STAGE_SHARDINGS: _Form("a sharding over each mesh by its name", _is_stage_shardings),
    ARGUMENT: _NUMBER,
    ROWS: _list(_integer(0, 2**63 - 1), "a list of the first row and the one behind the last"),
    ACCUMULATOR: _UNIT,
    MICROBATCH_INDEX: _UNIT,
}
_OF_RESULT: dict[str, _Form] = {UPDATES: _NUMBER, RESULT: _NUMBER, ROWS: _OF_ARGUMENT[ROWS]}
_OF_OP: dict[str, _Form] = {
    PHASE: _word((*PHASES, FUSED)),
    LAYER: _NUMBER,
    STAGE: _NUMBER,
    ROUND: _NUMBER,
    ACCUMULATE: _UNIT,
    COUNTER: _list(_NUMBER, "a list of results of @main"),
    PARTIAL: _UNIT,
}
_PLACES = {"a module": _OF_MODULE, "an argument": _OF_ARGUMENT, "a result": _OF_RESULT, "an op": _OF_OP}


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section "Attributes"."""
    _verify_entries(view.root.attributes.items(), "a module", view.root)
    counts = {STAGE: integer_attribute(view.root, NUM_STAGES), LAYER: integer_attribute(view.root, NUM_LAYERS)}
    for each in view.module.body.operations:
        if each.operation.name == "func.func":
            _verify_function(each.operation, counts)


def _verify_function(function: ir.Operation, counts: Mapping[str, int | None]) -> None:
    arguments, results = argument_attributes(function), result_attributes(function)
    blocks = list(function.regions[0].blocks)
    values = list(blocks[0].arguments) if blocks else [function] * len(arguments)
    for value, entry in zip(values, arguments, strict=True):
        _verify_entries(entry.items(), "an argument", value)
        _verify_index(entry, ALIAS, len(results), "results", value)
    for entry in results:
        _verify_entries(entry.items(), "a result", function)
        _verify_index(entry, UPDATES, len(arguments), "arguments", function)
    for op in nested_operations(function):
        attributes = op.attributes
        ours = {name: attributes[name] for name in attributes if name.startswith(_PREFIX)}
        _verify_entries(ours.items(), "an op", op)
        for name, count in counts.items():
            _verify_index(ours, name, count, f"{name.removeprefix(_PREFIX)}s", op)
        for number in ir.ArrayAttr(ours[COUNTER]) if COUNTER in ours else ():
            _verify_index({COUNTER: number}, COUNTER, len(results), "results", op)


def _verify_entries(entries: Iterable[tuple[str, ir.Attribute]], place: str, where: Locatable) -> None:
    """Each attribute with our prefix is known at this place, and has its form."""
    for name, attribute in entries:
        if not name.startswith(_PREFIX):
            continue
        form = _PLACES[place].get(name)
        if form is None:
            elsewhere = [other for other, forms in _PLACES.items() if name in forms]
            close = difflib.get_close_matches(name, _PLACES[place], 1)
            raise error_at(
                PassError,
                where,
                f"{place} has {name}, which "
                + (f"stands on {' or '.join(elsewhere)}" if elsewhere else "is no attribute of Bactrian's"),
                fix=f"did you mean {close[0]}?" if close else f"{place} has {', '.join(_PLACES[place])}",
            )
        if not form.fits(attribute):
            raise error_at(PassError, where, f"{name} is {attribute}, must be {form.allowed}")


def _verify_index(entry: Mapping[str, ir.Attribute], name: str, count: int | None, what: str, where: Locatable) -> None:
    """A number of something, where it is given, is that of one that is there."""
    if name not in entry or count is None:
        return
    attribute = entry[name]
    number = attribute.value if isinstance(attribute, ir.IntegerAttr) else -1
    if not 0 <= number < count:
        raise error_at(PassError, where, f"{name} is {attribute}, must be the number of one of {count} {what}")
