"""A failing pass leaves one file: the IR before it, the rest of the pipeline, versions.

``bactrian-opt --run-reproducer FILE`` runs it.
"""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError

_HEADER = "// bactrian-opt reproducer"
_PIPELINE = "// pipeline: "
SUFFIX = ".reproducer.mlir"


def versions() -> dict[str, str]:
    """The versions that decide what a pass does."""
    found = {"python": platform.python_version()}
    for name in ("bactrian", "jaxlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def write(operation: ir.Operation, pipeline: str, error: str, folder: str | None) -> str:
    """Write a reproducer and return its path.

    Args:
        operation: the module before the failing pass.
        pipeline: the failing pass and what was to follow.
        error: what happened.
        folder: where to; a new temporary folder when None.
    """
    if folder is None:
        folder = tempfile.mkdtemp(prefix="bactrian-")
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(suffix=SUFFIX, prefix="failure-", dir=folder)
    lines = [_HEADER, *(f"// error: {line}" for line in error.splitlines())]
    lines += [f"// {name}: {number}" for name, number in versions().items()]
    lines += [_PIPELINE + pipeline, str(operation.get_asm(enable_debug_info=True))]
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


def read_pipeline(text: str, path: str) -> str:
    """The pipeline that a reproducer runs.

    Raises:
        ConfigError: if the text is no reproducer.
    """
    for line in text.splitlines():
        if line.startswith(_PIPELINE):
            return line[len(_PIPELINE) :]
    raise ConfigError(f"{path} is no reproducer", why=f"it has no line that begins with {_PIPELINE.strip()!r}")
