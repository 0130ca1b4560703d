"""Fields of plans: their one canonical form, and how they are written as JSON and read again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import MAX_INTEGER, brief

Option = str | int | float | bool | None


# The JSON form. Each field is described by one kind, so that reading, writing and checking can't disagree.

_Check = Callable[[Any], Any]


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not 0 <= (number := operator.index(value)) <= MAX_INTEGER:
        raise TypeError
    return number


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)) or not math.isfinite(number := float(value)) or number < 0:
        raise TypeError
    return number + 0.0  # -0.0 becomes 0.0


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate has no UTF-8
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _option(value: Any) -> Option:
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise TypeError
    return _string(value) if isinstance(value, str) else value


def _items(value: Any, check: _Check) -> tuple[Any, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError
    return tuple(check(item) for item in cast(Iterable[Any], value))


def _pairs(value: Any, check: _Check) -> tuple[tuple[str, Any], ...]:
    pairs = tuple((_string(name), check(item)) for name, item in cast(Iterable[tuple[Any, Any]], value))
    if len(dict(pairs)) != len(pairs):
        raise TypeError
    return pairs


def _record(kind: type) -> _Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        check_types(value, kind.__name__)
        return value

    return check


# Field type as it is written above -> (what it should be, check).
_KINDS: dict[str, tuple[str, _Check]] = {
    "int": (f"an integer from 0 to {MAX_INTEGER}", _integer),
    "float": ("a finite number >= 0", _number),
    "str": ("a string", _string),
    "tuple[str, ...]": ("a list of strings", lambda value: _items(value, _string)),
    "tuple[tuple[str, int], ...]": ("axis names with sizes", lambda value: _pairs(value, _integer)),
    "tuple[tuple[str, Option], ...]": ("option names with plain values", lambda value: _pairs(value, _option)),
    "tuple[tuple[str, str], ...]": ("names with texts", lambda value: _pairs(value, _string)),
    "tuple[tuple[str, float], ...]": ("names with numbers", lambda value: _pairs(value, _number)),
    "bool": ("true or false", lambda value: _boolean(value)),
}
_RECORDS: dict[str, type] = {}  # lists of records
_SINGLE: dict[str, type] = {}  # one record


def add_record(kind: type, many: str) -> None:
    """Make a record known, alone and in lists; ``many`` says what a list of them is."""
    _KINDS[kind.__name__] = (f"a {kind.__name__}", _record(kind))
    _KINDS[f"tuple[{kind.__name__}, ...]"] = (many, lambda value: _items(value, _record(kind)))
    _RECORDS[f"tuple[{kind.__name__}, ...]"] = kind
    _SINGLE[kind.__name__] = kind


def check_types(record: Any, where: str) -> None:
    """Bring every field into its one canonical form (numpy integers, lists and so on), or say what it should be."""
    for item in fields(record):
        kind, value = str(item.type), getattr(record, item.name)
        if value is None and kind.endswith(" | None"):
            continue
        expected, check = _KINDS[kind.removesuffix(" | None")]
        try:
            object.__setattr__(record, item.name, check(value))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"bad plan: {where}.{item.name} should be {expected}, got {brief(value)}") from None


def encode(record: Any) -> dict[str, Any]:
    """A record as JSON has it; what is None is left out."""
    encoded: dict[str, Any] = {}
    for item in fields(record):
        kind, value = str(item.type), getattr(record, item.name)
        if value is None:
            continue
        if kind.startswith("tuple[tuple["):
            value = dict(value)
        elif kind in _RECORDS:
            value = [encode(entry) for entry in value]
        elif is_dataclass(value):
            value = encode(value)
        encoded[item.name] = value
    return encoded


def decode(kind: type, data: dict[str, Any], where: str, source: str) -> Any:
    """A record of what JSON has.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(data.keys() - known.keys())
    missing = [name for name, item in known.items() if item.default is MISSING and name not in data]
    for label, names in (("unknown", unknown), ("missing", missing)):
        if names:
            keys = "key" if len(names) == 1 else "keys"
            raise ConfigError(
                f"cannot read plan {source}: {label} {keys} in {where}: {', '.join(map(repr, names[:5]))}",
                fix=f"keys of {where.split('.')[-1].split('[')[0]} are {', '.join(known)}",
            )
    arguments: dict[str, Any] = {}
    for name, value in data.items():
        place, field_kind = f"{where}.{name}", str(known[name].type)
        if field_kind in _RECORDS:
            entries: list[Any] = (
                cast(list[Any], value) if isinstance(value, list) else _wrong(source, place, "a list", value)
            )
            records = [as_mapping(entry, f"{place}[{i}]", source) for i, entry in enumerate(entries)]
            value = tuple(
                decode(_RECORDS[field_kind], entry, f"{place}[{i}]", source) for i, entry in enumerate(records)
            )
        elif (single := field_kind.removesuffix(" | None")) in _SINGLE and value is not None:
            value = decode(_SINGLE[single], as_mapping(value, place, source), place, source)
        else:
            value = _decode_field(field_kind, value, place, source)
        arguments[name] = value
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"cannot read plan {source}: {error.message}") from None


def _decode_field(kind: str, value: Any, place: str, source: str) -> Any:
    if value is None and kind.endswith(" | None"):
        return None
    expected, check = _KINDS[kind.removesuffix(" | None")]
    if kind.startswith("tuple[tuple["):
        value = tuple(as_mapping(value, place, source).items())
    elif kind.startswith("tuple[") and not isinstance(value, list):
        _wrong(source, place, expected, value)
    try:
        return check(value)
    except (TypeError, ValueError, OverflowError):
        return _wrong(source, place, expected, value)


def as_mapping(value: Any, where: str, source: str) -> dict[str, Any]:
    """A value that has to be an object."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else _wrong(source, where, "an object", value)


def _wrong(source: str, where: str, expected: str, value: Any) -> Any:
    raise ConfigError(f"cannot read plan {source}: {where} should be {expected}, got {brief(value)}")
