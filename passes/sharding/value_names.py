"""Values of ``@main`` by the names that users know: pytree paths of arguments, name stacks of ops."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError, SourcePlace
from bactrian.passes.frame.location import name_stack, user_place
from bactrian.passes.sharding.loop_dataflow import INSIDE
from bactrian.passes.sharding.stage_programs import StageProgram

_MOST_LISTED = 20
_PARTS = re.compile(r"\w+")
_WRAPPERS = re.compile(r"[\w.-]*\(|\)")


@dataclass(frozen=True)
class NamedValue:
    """A value that a stage holds.

    Attributes:
        label: its name; ``name@2`` for the second value of one name.
        name: the pytree path of an argument, the name stack of an op.
        number: in the data flow.
        stage: that makes it; of an argument, or what another stage makes, that reads it.
        is_made: whether the stage makes it.
        is_free: whether any sharding of it costs nothing: a constant, or what is computed from constants alone.
        type: ``f32[256,1024]``.
        op, phase: that make it; "" of an argument.
        place: the user's line, of an argument that of its first reader.
    """

    label: str
    name: str
    number: int
    stage: int
    is_made: bool
    is_free: bool
    type: str
    op: str
    phase: str
    place: SourcePlace | None

    @property
    def origin(self) -> str:
        """``argument``, or its op and phase."""
        return ", ".join(filter(None, (self.op, self.phase))) or "argument"

    @property
    def names(self) -> tuple[str, ...]:
        """All that it may be called: with and without its number, with and without ``jvp(…)`` and its like."""
        both = self.label, self.name
        return (*both, *(_WRAPPERS.sub("", name) for name in both)) if self.op else both


def named_values(stages: Sequence[StageProgram]) -> list[NamedValue]:
    """The values of all stages, in program order; one that several stages hold once for each."""
    flow = stages[0].reading.flow  # of all of @main, as every stage reads it
    readers = flow.users()
    inside = {value for made, kind in zip(flow.results, flow.kinds, strict=True) if kind == INSIDE for value in made}
    names = ["" if number in inside else _name(value, number) for number, value in enumerate(flow.values)]
    count, labels, seen = Counter(names), list[str](), Counter[str]()
    for name in names:
        seen[name] += 1
        labels.append(name if count[name] == 1 else f"{name}@{seen[name]}")
    found = list[NamedValue]()
    for stage in stages:
        reading = stage.reading
        free = {value for op in reading.problem.ops if op.rule is None for value in op.results}
        made = {value for op in reading.problem.ops for value in op.results}
        for number in sorted({*reading.problem.inputs, *made}):
            value, producer = flow.values[number], flow.producer[number]
            op, phase, place = "", "", None
            if producer >= 0:
                op, phase = flow.ops[producer].name, flow.phases[producer] or ""
                place = user_place(flow.ops[producer].location)
            elif readers[number]:
                place = user_place(flow.ops[readers[number][0]].location)
            found.append(
                NamedValue(
                    labels[number],
                    names[number],
                    number,
                    stage.stage,
                    number in made,
                    number in free,
                    type_text(value.type),
                    op,
                    phase,
                    place,
                )
            )
    return found


def type_text(type_: ir.Type) -> str:
    """``f32[256,1024]``, as JAX writes it."""
    if not isinstance(type_, ir.RankedTensorType):
        return str(type_)
    return f"{type_.element_type}[{','.join(map(str, type_.shape))}]"


def find_value(
    values: Sequence[NamedValue], text: str, stage: int | None, sharding: Callable[[NamedValue], str]
) -> NamedValue:
    """The one value that a text means: by its label, its name, the end of its name, or a part of it, in this order;
    names of ops count with and without ``jvp(…)`` and its like.

    Args:
        values: to look among.
        text: the user's.
        stage: only what it holds; None for all.
        sharding: of a value, for a list of several.

    Raises:
        ConfigError: there is none, or there are several.
    """
    here = [value for value in values if stage in (None, value.stage)]
    tests: list[Callable[[NamedValue], bool]] = [
        lambda v: text == v.label,
        lambda v: text in v.names,
        lambda v: any(name.endswith(text) for name in v.names),
        lambda v: any(text in name for name in v.names),
    ]
    for test in tests if text else ():
        matches = [value for value in here if test(value)]
        matches = [value for value in matches if not value.is_free] or matches
        makers = {value.number for value in matches if value.is_made}
        if stage is None:  # what other stages get of a value is asked for by their number
            matches = [value for value in matches if value.is_made or value.number not in makers]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise _several(text, matches, sharding)
    close = _nearest(text, here)
    of_stage = "" if stage is None else f" in stage {stage}"
    raise ConfigError(
        f"no value is called {text!r}{of_stage}",
        why="values are called by the pytree path of an argument or the name stack of an op, or by a part of it",
        fix=f"did you mean {' or '.join(close)}?" if close else f"one is called {here[0].label}" if here else "",
    )


def _nearest(text: str, values: Sequence[NamedValue]) -> list[str]:
    """Names that look like a text, or have a part that does."""
    names = list(dict.fromkeys(value.name for value in values))
    close = difflib.get_close_matches(text, names, 3)
    parts = dict[str, list[str]]()
    for name in names:
        for part in _PARTS.findall(name):
            parts.setdefault(part, []).append(name)
    for part in difflib.get_close_matches(text, parts, 3, 0.5):
        close += parts[part]
    return list(dict.fromkeys(close))[:3]


def _several(text: str, matches: list[NamedValue], sharding: Callable[[NamedValue], str]) -> ConfigError:
    same = len({value.label for value in matches}) == 1
    lines = list[str]()
    for value in matches[:_MOST_LISTED]:
        where = "" if value.place is None else f"  {place_text(value.place)}"
        stage = f"  stage {value.stage}" if len({each.stage for each in matches}) > 1 else ""
        lines.append(f"{value.label}  {value.type}  {sharding(value) or 'a scalar'}  {value.origin}{stage}{where}")
    if len(matches) > _MOST_LISTED:
        lines.append(f"and {len(matches) - _MOST_LISTED} more")
    stages = ", ".join(str(value.stage) for value in matches)
    return ConfigError(
        f"{text!r} is ambiguous: it matches {len(matches)} values",
        why="\n    ".join(["the values that match", *lines]),
        fix=f"say which stage with --stage: {stages}" if same else "give one of these names",
    )


def place_text(place: SourcePlace) -> str:
    """``train.py:12``: without the folder, so that what is printed does not depend on it."""
    return f"{place.file.rpartition('/')[2]}:{place.line}"


def _name(value: ir.Value, number: int) -> str:
    if isinstance(value.owner, ir.Block):
        return name_stack(value.location) or f"argument {number}"
    op = value.owner.operation
    return name_stack(op.location) or op.name
