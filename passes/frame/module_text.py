"""The text of modules, as it comes from outside."""

from __future__ import annotations

import re

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ProgramError, SourcePlace

# A comment, the bytes that a backend reads, or a string with its escapes.
_TOKEN = re.compile(r'//[^\n]*|\bbackend_config = "(?:[^"\\\n]|\\.)*"|"(?P<string>(?:[^"\\\n]|\\.)*)"')
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2})")


def parse_module(text: str, file: str) -> ir.Module:
    """Parse a module from outside. A context must be entered.

    Args:
        text: of the module.
        file: what the place of an error is said to be in.

    Raises:
        MLIRError: it is no valid module.
        ProgramError: a string has bytes that are not UTF-8, or a number makes MLIR's parser give up.
    """
    check_strings(text, file)
    try:
        return ir.Module.parse(text)
    except ir.MLIRError:
        raise
    except (ValueError, RuntimeError, MemoryError) as error:  # of the C++ library
        raise ProgramError(
            "MLIR's parser cannot read the module", why=str(error), fix="look for a number that is far too large"
        ) from None


def check_strings(text: str, file: str) -> None:
    """Refuse a module whose strings are no text: MLIR keeps any bytes, and its Python bindings end the process there.

    The ``backend_config`` of a custom call is no text, and nothing reads it as one.

    Args:
        text: of the module.
        file: what the place is said to be in.

    Raises:
        ProgramError: a string has bytes that are not UTF-8.
    """
    for token in _TOKEN.finditer(text):
        string = token["string"]
        if not string or "\\" not in string:
            continue
        value = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), string.encode(errors="surrogatepass"))
        try:
            value.decode()
        except UnicodeDecodeError as error:
            line = text.count("\n", 0, token.start()) + 1
            place = SourcePlace(file, line, token.start() - text.rfind("\n", 0, token.start()))
            raise ProgramError(
                f'the string "{string}" is not UTF-8: byte {error.start} is 0x{value[error.start]:02X}',
                where=str(place),
                fix="write names and texts in UTF-8",
                place=place,
            ) from None
