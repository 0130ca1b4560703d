"""The text of modules, as it comes from outside."""

from __future__ import annotations

import io
import re

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ProgramError, SourcePlace

# A comment, an arrow, the bytes that a backend reads, a string with its escapes, or a bracket.
_TOKEN = re.compile(
    r'//[^\n]*|->|\bbackend_config = "(?:[^"\\\n]|\\.)*"|"(?P<string>(?:[^"\\\n]|\\.)*)"'
    r"|(?P<open>[(\[{<])|(?P<close>[)\]}>])"
)
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2})")
_MOST_BRACKETS = 1000


def parse_module(text: str, file: str) -> ir.Module:
    """Parse a module from outside. A context must be entered.

    Args:
        text: of the module.
        file: what the place of an error is said to be in.

    Raises:
        MLIRError: it is no valid module.
        ProgramError: it is one that MLIR or its Python bindings fail on, or end the process: a string whose bytes are
            not UTF-8, brackets in brackets beyond the stack, a number beyond the memory.
    """
    _check_text(text, file)
    try:
        return ir.Module.parse(text)
    except ir.MLIRError:
        raise
    except (ValueError, RuntimeError, MemoryError) as error:  # of the C++ library
        raise ProgramError(
            "MLIR's parser cannot read the module", why=str(error), fix="look for a number that is far too large"
        ) from None


def _check_text(text: str, file: str) -> None:
    """Refuse strings that are no text, and brackets in brackets.

    The ``backend_config`` of a custom call is no text, and nothing reads it as one.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            depth += 1
            if depth > _MOST_BRACKETS:
                where = _place(text, token.start(), file)
                raise ProgramError(
                    f"cannot read brackets in more than {_MOST_BRACKETS} brackets", where=str(where), place=where
                )
        elif kind == "close":
            depth -= 1
        elif kind == "string" and "\\" in token["string"]:
            _check_string(token["string"], _place(text, token.start(), file))


def _check_string(string: str, place: SourcePlace) -> None:
    value = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), string.encode(errors="surrogatepass"))
    try:
        value.decode()
    except UnicodeDecodeError as error:
        raise ProgramError(
            f'the string "{string}" is not UTF-8: byte {error.start} is 0x{value[error.start]:02X}',
            where=str(place),
            fix="write names and texts in UTF-8",
            place=place,
        ) from None


def _place(text: str, at: int, file: str) -> SourcePlace:
    return SourcePlace(file, text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))


def copy_module(module: ir.Module) -> ir.Module:
    """A copy of a module, in its context."""
    written = io.BytesIO()
    module.operation.write_bytecode(written)
    return ir.Module.parse(written.getvalue(), module.context)
