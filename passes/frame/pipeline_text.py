"""The text of a pipeline, in MLIR's grammar: parsed into elements and printed again.

``builtin.module(flatten-calls,group-layers{layers=4},func.func(canonicalize))``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bactrian.passes.frame.errors import ConfigError

ANCHOR = "builtin.module"


@dataclass(frozen=True)
class Element:
    """One entry of a pipeline: a pass with options, or an op name with a nested pipeline.

    Args:
        name: the pass, or the op that the nested pipeline runs on.
        options: name and raw text of each option; the text is None for a bare flag.
        children: the nested pipeline, None for a pass.
    """

    name: str
    options: tuple[tuple[str, str | None], ...] = ()
    children: tuple[Element, ...] | None = None

    def __str__(self) -> str:
        if self.children is not None:
            return f"{self.name}({print_pipeline(self.children)})"
        if not self.options:
            return self.name
        words = (key if text is None else f"{key}={quote(text)}" for key, text in self.options)
        return f"{self.name}{{{' '.join(words)}}}"


def quote(text: str) -> str:
    """An option's text as the grammar wants it: quoted where it has blanks, braces or nothing at all."""
    balanced = len(text) > 1 and text[0] + text[-1] in ("{}", "[]")
    if text and (balanced or not any(char.isspace() or char in "{}'\"," for char in text)):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'


def print_pipeline(elements: Sequence[Element]) -> str:
    """The text of a pipeline without its anchor; `parse_pipeline` reads it back."""
    return ",".join(map(str, elements))


def parse_pipeline(text: str) -> tuple[Element, ...]:
    """Parse a pipeline, with or without ``builtin.module(...)`` around it.

    Raises:
        ConfigError: with the column, when the text doesn't follow MLIR's grammar.
    """
    parser = _Parser(text)
    elements = parser.elements(end="")
    if len(elements) == 1 and elements[0].name == ANCHOR and elements[0].children is not None:
        return elements[0].children
    return elements


_MAX_DEPTH = 100


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def elements(self, end: str) -> tuple[Element, ...]:
        found: list[Element] = []
        while True:
            self._skip_blanks()
            if self._peek() == end:
                break
            found.append(self._element())
            self._skip_blanks()
            if self._peek() != ",":
                break
            self._at += 1
        if self._peek() != end:
            raise self._error(f"expected {repr(end) if end else 'the end'}")
        self._at += len(end)
        return tuple(found)

    def _element(self) -> Element:
        start = self._at
        while (char := self._peek()) and char not in "(){}," and not char.isspace():
            self._at += 1
        name = self._text[start : self._at]
        if not name:
            raise self._error("expected a pass name")
        if self._peek() == "(":
            self._at += 1
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise self._error(f"more than {_MAX_DEPTH} pass managers in each other")
            children = self.elements(end=")")
            self._depth -= 1
            return Element(name, children=children)
        if self._peek() == "{":
            self._at += 1
            return Element(name, options=self._options())
        return Element(name)

    def _options(self) -> tuple[tuple[str, str | None], ...]:
        found: list[tuple[str, str | None]] = []
        while True:
            self._skip_blanks()
            if self._peek() == "}":
                self._at += 1
                return tuple(found)
            start = self._at
            while (char := self._peek()) and char not in "={}" and not char.isspace():
                self._at += 1
            key = self._text[start : self._at]
            if not key:
                raise self._error("expected an option name or '}'")
            if self._peek() == "=":
                self._at += 1
                found.append((key, self._value()))
            else:
                found.append((key, None))

    def _value(self) -> str:
        """A bare word, a quoted text without its quotes, or balanced braces or brackets."""
        start, opening = self._at, self._peek()
        if opening in ("'", '"') and opening:
            end = self._text.find(opening, start + 1)
            if end < 0:
                raise self._error("unterminated string")
            self._at = end + 1
            return self._text[start + 1 : end]
        depth = 0
        while char := self._peek():
            if depth == 0 and (char == "}" or char.isspace()):
                break
            depth += (char in "{[") - (char in "}]")
            self._at += 1
        if depth:
            raise self._error("unbalanced braces")
        return self._text[start : self._at]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_blanks(self) -> None:
        while self._peek().isspace():
            self._at += 1

    def _error(self, message: str) -> ConfigError:
        return ConfigError(
            f"malformed pass pipeline at column {self._at + 1}: {message}",
            where=f"{self._text}\n         {' ' * self._at}^",
        )
