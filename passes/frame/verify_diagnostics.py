"""``--verify-diagnostics``: what a test file says it expects, compared with what was reported.

``// expected-error@+1 {{text}}`` expects an error on the next line whose text contains ``text``; ``@-2``, ``@above``
and ``@below`` (the nearest line that expects nothing) and ``@unknown`` (a place outside the file) are known too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bactrian.passes.frame.diagnostics import Diagnostic

_EXPECTED = re.compile(r"expected-(error|warning|remark|note)\s*(?:@([+-]\d+|above|below|unknown))?\s*\{\{(.*?)\}\}")


@dataclass
class Expectation:
    """One ``expected-...``: the severity, the line it means (None for ``@unknown``) and a part of the text."""

    severity: str
    line: int | None
    text: str
    written_on: int
    met: bool = False


def parse_expectations(text: str) -> list[Expectation]:
    """Every expectation of a file, in order.

    Example: ``// expected-error@+1 {{no}}`` on line 4 means line 5.
    """
    lines = text.splitlines()
    silent = [not _EXPECTED.search(line) for line in lines]
    found: list[Expectation] = []
    for index, line in enumerate(lines):
        for severity, at, wanted in _EXPECTED.findall(line):
            number: int | None = index + 1
            if at == "unknown":
                number = None
            elif at in ("above", "below"):
                step = -1 if at == "above" else 1
                place = index + step
                while 0 <= place < len(lines) and not silent[place]:
                    place += step
                number = place + 1
            elif at:
                number = index + 1 + int(at)
            found.append(Expectation(severity, number, wanted, index + 1))
    return found


def compare(text: str, reported: Sequence[Diagnostic], files: Sequence[str]) -> list[str]:
    """What is wrong: every report that was not expected and every expectation that was not met.

    Args:
        text: the test, with its expectations.
        reported: what the run reported.
        files: the names that mean the test file itself; other places are ``@unknown``.
    """
    expectations = parse_expectations(text)
    problems: list[str] = []
    for diagnostic in reported:
        inside = diagnostic.place is not None and diagnostic.place.file in files and diagnostic.place.line > 0
        line = diagnostic.place.line if inside and diagnostic.place else None
        for expectation in expectations:
            fits = expectation.severity == diagnostic.severity and expectation.line == line
            if fits and not expectation.met and expectation.text in diagnostic.text():
                expectation.met = True
                break
        else:
            if diagnostic.severity != "note":
                problems.append(f"{line or 'unknown place'}: unexpected {diagnostic.severity}: {diagnostic.text()}")
    problems += [
        f"{e.written_on}: expected {e.severity} {e.text!r} at {e.line or 'an unknown place'} was not produced"
        for e in expectations
        if not e.met
    ]
    return problems
