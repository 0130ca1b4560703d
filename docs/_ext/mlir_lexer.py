"""Colours for MLIR in code blocks; Pygments has no lexer for it."""

from __future__ import annotations

from typing import Any, ClassVar

from pygments.lexer import RegexLexer
from pygments.token import Comment, Keyword, Name, Number, Punctuation, String, Text
from sphinx.application import Sphinx


class MLIRLexer(RegexLexer):
    """Values, symbols, attributes, types, numbers and strings; everything else is text."""

    name = "MLIR"
    aliases: ClassVar[list[str]] = ["mlir"]
    tokens: ClassVar[dict[str, Any]] = {
        "root": [
            (r"//[^\n]*", Comment.Single),
            (r'"(\\.|[^"\\])*"', String),
            (r"%[\w$.-]+(#\d+)?(:\d+)?", Name.Variable),
            (r"@[\w$.-]+", Name.Function),
            (r"\^[\w$.-]+", Name.Label),
            (r"[#!][\w$.-]+", Name.Decorator),
            (r"(\d+x)+(?=[a-z])", Number.Integer),
            (r"\b(tensor|memref|vector|tuple)\b", Keyword.Type),
            (r"([su]?i\d+|bf16|f\d+|index|complex)\b", Keyword.Type),
            (r"\b(module|attributes|return|loc|dense|true|false|unit)\b", Keyword),
            (r"\b\w+\.[\w.]+\b", Name.Builtin),
            (r"-?\d+\.\d+([eE][+-]?\d+)?", Number.Float),
            (r"\d+", Number.Integer),
            (r"\s+", Text),
            (r"[\w$]+", Text),
            (r".", Punctuation),
        ]
    }


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the lexer for blocks marked ``mlir``."""
    app.add_lexer("mlir", MLIRLexer)
    return {"parallel_read_safe": True}
