"""From an MLIR location to the user's ``file:line`` and the name stack.

JAX writes on every op ``loc("jit(step)/transpose(jvp(block_1))/dot_general"(callsite("f"("a.py":3:1) at ...)))``:
the outer name is the name stack, the call sites are the Python frames, innermost first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import SourcePlace

# Where our own code lies: beside each other, in an installed package as in a checkout.
_OWN_FOLDERS = tuple(
    os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), name) + os.sep
    for name in ("passes", "driver", "runtime", "bactrian")
)
_FOREIGN_PARTS = ("site-packages", "dist-packages")
_LIBRARY_FOLDERS = ("/jax/_src/", "/jax/experimental/", "/jax/numpy/", "/flax/", "/optax/", "/equinox/")
_STDLIB = os.path.dirname(os.__file__) + os.sep


@functools.lru_cache(maxsize=4096)
def is_user_file(path: str) -> bool:
    """Whether a frame in ``path`` is the user's own code: not Bactrian, a library or the standard library."""
    parts = path.split("/")
    if any(part in parts for part in _FOREIGN_PARTS) or path.startswith("<frozen"):
        return False
    if any(folder in path for folder in _LIBRARY_FOLDERS):
        return False
    return not path.startswith((*_OWN_FOLDERS, _STDLIB))


def _frames(loc: ir.Location) -> Iterator[SourcePlace]:
    """Every Python frame of a location, innermost first."""
    stack = [loc]
    while stack:
        top = stack.pop()
        if isinstance(top, ir.FileLineColLoc):
            yield SourcePlace(top.filename, top.start_line, top.start_col)
        elif isinstance(top, ir.NameLoc):
            stack.append(top.child_loc)
        elif isinstance(top, ir.CallSiteLoc):
            stack += (top.caller, top.callee)
        elif isinstance(top, ir.FusedLoc):
            stack += reversed([child for child in top.locations if isinstance(child, ir.Location)])


def user_place(loc: ir.Location) -> SourcePlace | None:
    """The innermost frame in the user's own code; the innermost frame of all when none is; else None."""
    first: SourcePlace | None = None
    for place in _frames(loc):
        if is_user_file(place.file):
            return place
        first = first or place
    return first


def user_location(loc: ir.Location) -> str:
    """``file:line`` in the user's code, or "" where the location knows no file.

    Example: ``loc("jit(f)/tanh"(callsite("layer"("model.py":4:11) at "f"("train.py":9:3))))`` gives ``model.py:4``.
    """
    place = user_place(loc)
    return "" if place is None else str(place)


def name_stack(loc: ir.Location) -> str:
    """The name stack, as in ``jit(step)/jvp(block_1)/dot_general``; "" where there is none.

    For an argument this is its pytree path (``state['w']``).
    """
    while isinstance(loc, ir.FusedLoc):
        children = [child for child in loc.locations if isinstance(child, ir.Location)]
        named = [child for child in children if isinstance(child, (ir.NameLoc, ir.CallSiteLoc))]
        if not named:
            return ""
        loc = named[0]
    if isinstance(loc, ir.CallSiteLoc):  # MLIR's inliner: the callee's own name is the more telling one
        return name_stack(loc.callee) or name_stack(loc.caller)
    if not isinstance(loc, ir.NameLoc):
        return ""
    name = loc.name_str
    if name.endswith(":"):  # jax wraps some names once more: "closed_call:"("while/body/closed_call"(...))
        return name_stack(loc.child_loc) or name[:-1]
    return name


def describe(loc: ir.Location) -> str:
    """``file:line (name stack)``, with what is known of the two."""
    place, name = user_location(loc), name_stack(loc)
    if place and name:
        return f"{place} ({name})"
    return place or name


Locatable = ir.Location | ir.Value | ir.Operation | ir.OpView


def location_of(where: Locatable) -> ir.Location:
    """The location of a value or an op."""
    return where if isinstance(where, ir.Location) else where.location


def where_text(where: Locatable) -> str:
    """`describe` of a value or an op; the op's name where nothing else is known of it."""
    text = describe(location_of(where))
    if not text and isinstance(where, (ir.Operation, ir.OpView)):
        return where.operation.name
    return text
