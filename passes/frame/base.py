"""What a pass is: a frozen dataclass whose fields are its options, with ``apply(module, ctx)``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import Diagnostic, Severity, diagnostic_of, merge_errors
from bactrian.passes.frame.errors import BactrianError, ConfigError, ProgramError
from bactrian.passes.frame.location import Locatable, location_of, user_place, where_text
from bactrian.passes.frame.phase_times import PhaseClock

T = TypeVar("T")
ERROR_LIMIT = 10
_MAX_NUMBER = 1 << 48  # of options


@dataclass(frozen=True)
class Statistic:
    """A counter that a pass reports, in dashes: ``Statistic("cut-bytes", "bytes that cross the cuts")``."""

    name: str
    help: str


def option(default: T, *, help: str) -> T:
    """A pass option: an ``int``, ``float``, ``str``, ``bool`` or optional one of these, with its help text.

    Its name on the command line is the field's, with dashes for underscores.
    """
    return field(default=default, metadata={"help": help})


class PassContext:
    """What a pass gets besides the module: counters, diagnostics, and a clock for phases within the pass.

    Errors are collected, so that one run reports several; they fail the run when the pass ends.
    """

    def __init__(self, owner: Pass, limit: int = ERROR_LIMIT, kept: Mapping[type, Any] | None = None) -> None:
        self.clock = PhaseClock()
        self.keeps: dict[type, Any] = {}
        self._kept = kept or {}
        self.counts: dict[str, int] = {statistic.name: 0 for statistic in owner.statistics}
        self.diagnostics: list[Diagnostic] = []
        self._limit = limit
        self._owner = owner.name

    def count(self, statistic_name: str, n: int = 1) -> None:
        """Add ``n`` to a declared statistic."""
        assert statistic_name in self.counts, f"{self._owner} declares no statistic {statistic_name!r}"
        self.counts[statistic_name] += n

    def keep(self, analysis: object) -> None:
        """Say that an analysis still holds for the IR that this pass leaves, so that the next pass need not make it."""
        self.keeps[type(analysis)] = analysis

    def kept(self, kind: type[T]) -> T | None:
        """The analysis of this kind that the pass before kept; None where there is none."""
        return self._kept.get(kind)

    def note(self, where: Locatable, message: str) -> None:
        """Tell of what was done, for who runs the pass alone: its results say the same."""
        self._add("note", where, message)

    def remark(self, where: Locatable, message: str, why: str = "", fix: str = "") -> None:
        """Tell the user something that is neither wrong nor doubtful."""
        self._add("remark", where, message, why, fix)

    def warning(self, where: Locatable, message: str, why: str = "", fix: str = "") -> None:
        """Tell the user about something doubtful."""
        self._add("warning", where, message, why, fix)

    def error(self, where: Locatable, message: str, why: str = "", fix: str = "") -> None:
        """Report an error in the user's program; the pass may go on to find more."""
        self._add("error", where, message, why, fix)

    def fail_if_errors(self) -> None:
        """Raise `ProgramError` if any error was reported: for passes that can't go on after some."""
        errors = [d for d in self.diagnostics if d.severity == "error"]
        if errors:
            raise merge_errors(errors, self._limit)

    def fatal(self, where: Locatable, message: str, why: str = "", fix: str = "") -> ProgramError:
        """Report an error and return the exception to raise: ``raise ctx.fatal(op, "...")``."""
        self.error(where, message, why, fix)
        return merge_errors([d for d in self.diagnostics if d.severity == "error"], self._limit)

    def report(self, error: BactrianError, module: ir.Operation) -> None:
        """Report an exception that ended the pass: at its own place, else at the module."""
        self.diagnostics.append(replace(diagnostic_of(error), place=error.place or user_place(module.location)))

    def _add(self, severity: Severity, where: Locatable, message: str, why: str = "", fix: str = "") -> None:
        place = user_place(location_of(where))
        self.diagnostics.append(Diagnostic(severity, message, where_text(where), place, why, fix))


@dataclass(frozen=True)
class Pass:
    """Base of every pass: one file, one flag, one pair of lit files.

    A subclass is a frozen dataclass whose fields are made with `option`. It anchors on the module.

    Its docstring becomes its entry in ``docs/passes.md``: a summary, what and why, ``Requires:``, ``Ensures:``, and two
    ```` ```mlir ```` blocks, a module before and the same module after the pass with default options. A test runs them.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    statistics: ClassVar[tuple[Statistic, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()  # the contracts that it relies on, as `registry.CONTRACTS` calls them
    ensures: ClassVar[tuple[str, ...]] = ()  # the contracts that hold after it

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Rewrite ``module`` in place. Must leave it valid."""
        raise NotImplementedError

    def check_options(self) -> None:
        """Raise `ConfigError` when option values don't fit together. Called before the pipeline runs."""

    @classmethod
    def option_fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """The dataclass fields that are options, in order of declaration."""
        return dataclasses.fields(cls)

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Pass:
        """Make a pass from the text of its options.

        Raises:
            ConfigError: for an unknown option or a value of the wrong type.
        """
        kinds = typing.get_type_hints(cls)
        values = parse_options(f"pass {cls.name}", options, {f.name: kinds[f.name] for f in cls.option_fields()})
        instance = cls(**values)
        instance.check_options()
        return instance

    def option_texts(self) -> dict[str, str]:
        """The options that differ from their defaults, as text; what `from_options` reads."""
        return {
            f.name.replace("_", "-"): _print_value(getattr(self, f.name))
            for f in self.option_fields()
            if getattr(self, f.name) != f.default
        }


def parse_options(owner: str, texts: Mapping[str, str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options by their Python names, from their texts.

    Args:
        owner: whose they are, for errors: ``pass group-layers``.
        texts: of the options that are given, by their names, with dashes or underscores.
        kinds: the type of every option, by its Python name.

    Raises:
        ConfigError: for an unknown option or a value of the wrong type.
    """
    known = {name.replace("_", "-"): name for name in kinds}
    values: dict[str, Any] = {}
    for key, text in texts.items():
        name = known.get(key.replace("_", "-"))
        if name is None:
            raise ConfigError(f"{owner} has no option {key!r}", fix=f"options: {', '.join(known) or 'none'}")
        values[name] = _parse_value(owner, key, text, kinds[name])
    return values


def _parse_value(owner: str, key: str, text: str, hint: Any) -> Any:
    kinds = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if text == "none":
            return None
    kind = kinds[0]
    try:
        if kind is bool:
            return {"true": True, "1": True, "": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"option {key!r} of {owner} needs {kind.__name__}, got {text!r}") from None
    if kind in (int, float) and not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        raise ConfigError(f"option {key!r} of {owner} is {text}, must be from -2^48 to 2^48")
    return value


def _print_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
