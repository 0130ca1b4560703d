"""The pass reference, made from the pass classes: help, JSON, ``docs/passes.md`` and the examples that tests run."""

from __future__ import annotations

import inspect
import re
from typing import Any

from bactrian.passes.frame import registry
from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.errors import ConfigError

_MLIR_BLOCK = re.compile(r"```mlir\n(.*?)```", re.DOTALL)
_CLAUSE = re.compile(r"^(Requires|Ensures|Example):", re.MULTILINE)


def pass_table() -> list[dict[str, Any]]:
    """Every registered pass as plain data: name, summary, options and statistics."""
    return [_describe(registry.load(name)) for name in registry.names()]


def _describe(cls: type[Pass]) -> dict[str, Any]:
    options = [
        {
            "name": f.name.replace("_", "-"),
            "type": str(f.type),
            "default": f.default,
            "help": f.metadata.get("help", ""),
        }
        for f in cls.option_fields()
    ]
    statistics = [{"name": statistic.name, "help": statistic.help} for statistic in cls.statistics]
    return {"name": cls.name, "summary": cls.summary, "options": options, "statistics": statistics}


def help_text() -> str:
    """One line per pass and option; a pass that can't be loaded says so instead of breaking the help."""
    lines = ["passes, run in the order given:"]
    for name in registry.names():
        try:
            row = _describe(registry.load(name))
        except ConfigError as error:
            lines.append(f"  --{name:24} ({error.message})")
            continue
        lines.append(f"  --{name:24} {row['summary']}")
        lines += [f"      {o['name']}={_text(o['default'])}: {o['help']}" for o in row["options"]]
    lines.append("and every pass of MLIR, StableHLO and Shardy that jaxlib registers (--canonicalize, --cse, ...)")
    return "\n".join(lines)


def pipelines_text() -> str:
    """One line per pipeline: its name and what it does."""
    lines = ["pipelines, each run as its passes in order:"]
    for name in registry.PIPELINES:
        first = (inspect.getdoc(registry.load_pipeline(name)) or "").partition("\n")[0]
        lines.append(f"  --{name:28} {first[:1].lower()}{first[1:].removesuffix('.')}")
    return "\n".join(lines)


def example(cls: type[Pass]) -> tuple[str, str] | None:
    """The module before and after the pass from its docstring; None when there are not exactly two blocks."""
    blocks = _MLIR_BLOCK.findall(inspect.getdoc(cls) or "")
    return (blocks[0], blocks[1]) if len(blocks) == 2 else None


def markdown() -> str:
    """The text of ``docs/passes.md``."""
    lines = [
        "# The passes",
        "",
        "Made by `bactrian-opt --list-passes=markdown`; do not edit. In the order in which they run.",
    ]
    for name in registry.PASSES:
        cls = registry.load(name)
        row = _describe(cls)
        lines += ["", f"## {name}", "", _paragraphs(inspect.getdoc(cls) or "")]
        if row["options"]:
            lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
            for o in row["options"]:
                kind = o["type"].replace("|", "\\|")
                lines.append(f"| `{o['name']}` | `{kind}` | `{_text(o['default'])}` | {o['help']} |")
        if row["statistics"]:
            lines += ["", "| statistic | meaning |", "|---|---|"]
            lines += [f"| `{s['name']}` | {s['help']} |" for s in row["statistics"]]
    return "\n".join(lines) + "\n"


def _paragraphs(docstring: str) -> str:
    """The docstring with each clause (``Requires:``, ``Ensures:``, ``Example:``) as a paragraph of its own."""
    return re.sub(r"\n{3,}", "\n\n", _CLAUSE.sub(r"\n**\1:**", docstring))


def _text(value: Any) -> str:
    """An option's default as it is written on the command line."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
