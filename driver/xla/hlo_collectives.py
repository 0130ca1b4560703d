"""The collectives of a compiled module, read from the text of its optimized HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from bactrian.passes.frame.errors import PassError

_INTEGERS = {f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}
_BITS = {"pred": 8, "token": 0, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128} | _INTEGERS
_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Opcodes that move data between devices and that nothing here can count.
_UNREAD = ("collective-broadcast", "ragged-all-to-all", "send", "recv", "all-reduce-scatter")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\]")
_CALLED = re.compile(r"\b(to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[[\d,]+\](?:T\([\d,]+\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\([^{}]*\))? ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclass(frozen=True)
class HloCollective:
    """One collective that a compiled module runs.

    Attributes:
        kind: with Shardy's names, as ``all_gather``.
        group: devices that take part together.
        nbytes: what each of them sends when the op runs once, counted as `bactrian.passes.sharding.collective_bytes` counts.
        times: how often it runs when the module runs once; None where that is not written down: in a loop without a
            known trip count, or in a branch.
        shapes: of its results on one device, as ``f32[8,4]``; several where XLA has combined several collectives into
            one, and those of the pieces of an all-to-all.
        name: of the instruction.
        op_name: the name stack of the op that it comes from; of all of them where XLA has combined several.
        where: ``file:line`` of the innermost frame of that op, "" if unknown.
    """

    kind: str
    group: int
    nbytes: float
    times: int | None
    shapes: tuple[str, ...]
    name: str
    op_name: str = ""
    where: str = ""

    @property
    def result_bytes(self) -> tuple[float, ...]:
        """Of each result on one device."""
        return tuple(_nbytes(shape) for shape in self.shapes)

    @property
    def element_bytes(self) -> tuple[float, ...]:
        """Of an element of each result."""
        return tuple(_nbytes(shape.partition("[")[0] + "[]") for shape in self.shapes)

    @property
    def total_bytes(self) -> float:
        """What each device sends when the module runs once; an op that runs an unknown number of times counts once."""
        return self.nbytes * (1 if self.times is None else self.times)


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str
    line: str


@dataclass
class _Module:
    computations: dict[str, list[_Instruction]] = field(default_factory=dict[str, list[_Instruction]])
    entry: str = ""
    frames: dict[int, str] = field(default_factory=dict[int, str])  # innermost file:line of each stack frame
    num_devices: int = 1


def read_collectives(text: str) -> list[HloCollective]:
    """The collectives of a module's text, those of called computations and loops included, in order of calls.

    Args:
        text: as ``executable.hlo_modules()[0].to_string()`` gives it.

    Raises:
        PassError: the text has a collective, a shape or a group in a form that is not known; names the line.
    """
    module = _parse(text)
    found = list[HloCollective]()
    seen = set[str]()
    _walk(module, module.entry, 1, found, seen)
    for name, instructions in module.computations.items():
        if name not in seen and any(_kind(instruction) for instruction in instructions):
            raise PassError(
                f"cannot read compiled HLO: computation {name} has collectives, but nothing calls it",
                why="unsupported call form in HLO",
            )
    return found


def op_names(text: str) -> list[str]:
    """The name stack of every instruction that has one, in order of the text."""
    return re.findall(r'op_name="((?:[^"\\]|\\.)*)"', text)


def _parse(text: str) -> _Module:
    module = _Module()
    head = re.match(r"HloModule [^\n]*", text)
    if head is None:
        raise PassError("cannot read compiled HLO: it does not begin with HloModule", why=text[:200])
    counts = [int(match) for match in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head[0])]
    module.num_devices = math.prod(counts)
    module.frames = _frames(text)
    current: list[_Instruction] | None = None
    for line in text.splitlines():
        if match := _HEAD.match(line):
            current = module.computations.setdefault(match[2], [])
            module.entry = match[2] if match[1] else module.entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            current.append(_instruction(line))
    if not module.entry:
        raise PassError("cannot read compiled HLO: it has no ENTRY computation")
    return module


def _instruction(line: str) -> _Instruction:
    match = _NAME.match(line)
    if match is None:
        raise _unknown("instruction", line)
    rest = line[match.end() :]
    end = _closing(rest, line) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r" ([\w-]+)\(", rest[end:])
    if end < 0 or opcode is None:
        raise _unknown("instruction", line)
    return _Instruction(match[1], rest[:end], opcode[1], rest[end + opcode.end() - 1 :], line)


def _closing(text: str, line: str) -> int:
    """Where the parenthesis that ``text`` begins with is closed."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at
    raise _unknown("type", line)


def _walk(module: _Module, name: str, times: int | None, found: list[HloCollective], seen: set[str]) -> None:
    if name not in module.computations:
        raise PassError(f"cannot read compiled HLO: it calls {name}, which is not there")
    seen.add(name)
    for instruction in module.computations[name]:
        kind = _kind(instruction)
        if kind and not instruction.opcode.endswith("-done"):
            found.append(_collective(module, instruction, kind, times))
        for callee, runs in _calls(instruction):
            _walk(module, callee, None if times is None or runs is None else times * runs, found, seen)


def _calls(instruction: _Instruction) -> Iterator[tuple[str, int | None]]:
    """The computations that an instruction calls, each with how often."""
    rest, runs = instruction.rest, 1
    if instruction.opcode == "while":
        trips = _TRIPS.search(rest)
        runs = int(trips[1]) if trips else None
    elif instruction.opcode == "conditional":
        runs = None
    for match in _CALLED.finditer(rest):
        yield match[2], runs
    for match in _BRANCHES.finditer(rest):
        for name in match[1].split(","):
            yield name.strip().removeprefix("%"), runs


def _kind(instruction: _Instruction) -> str:
    """The kind of a collective; "" for all other instructions."""
    opcode = instruction.opcode.removesuffix("-start").removesuffix("-done").removesuffix("-update")
    if opcode in _KINDS:
        return opcode.replace("-", "_")
    if opcode in _UNREAD or opcode.startswith(("all-", "collective-", "ragged-")):
        raise _unknown("collective", instruction.line)
    return ""


def _collective(module: _Module, instruction: _Instruction, kind: str, times: int | None) -> HloCollective:
    shapes = _result_shapes(instruction, kind)
    if any(_nbytes(shape) < 0 for shape in shapes):
        raise _unknown("shape", instruction.line)
    result = sum(map(_nbytes, shapes))
    group = 0 if kind == "collective_permute" else _group(instruction, module.num_devices)
    if kind == "collective_permute":
        group, nbytes = module.num_devices, result if _moves(instruction) else 0.0
    elif kind == "all_gather":
        nbytes = (group - 1) / group * result
    elif kind == "reduce_scatter":
        nbytes = (group - 1) * result
    elif kind == "all_reduce":
        nbytes = 2 * (group - 1) / group * result
    else:
        nbytes = (group - 1) / group * result
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
    return HloCollective(
        kind, group, nbytes, times, shapes, instruction.name, op_name[1] if op_name else "", _where(module, instruction)
    )


def _result_shapes(instruction: _Instruction, kind: str) -> tuple[str, ...]:
    """The shapes of the results, without layouts. An asynchronous op has operands and other things beside them."""
    type_ = re.sub(r"/\*.*?\*/", "", instruction.type)
    if instruction.opcode.endswith("-start") and kind != "all_reduce":
        parts = _parts(type_)
        if len(parts) < 2:
            raise _unknown("asynchronous collective", instruction.line)
        type_ = parts[1]
    shapes = tuple(f"{match[1]}[{match[2]}]" for match in _ARRAY.finditer(type_))
    if not shapes:
        raise _unknown("type", instruction.line)
    return shapes


def _parts(type_: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth, start = list[str](), 0, 1
    for at, letter in enumerate(type_):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(type_[start:at].strip())
            start = at + 1
    return parts


def _nbytes(shape: str) -> float:
    """Bytes of a shape; -1 for one that is not known, or dynamic."""
    kind, _, dims = shape.rstrip("]").partition("[")
    bits = _BITS.get(kind, 8 if kind.startswith("f8") else 4 if kind.startswith("f4") else None)
    if bits is None or "<" in dims:
        return -1.0
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8


def _group(instruction: _Instruction, num_devices: int) -> int:
    """How many devices take part together."""
    rest = instruction.rest
    if match := _IOTA_GROUPS.search(rest):
        return int(match[2])
    if match := _MESH_GROUPS.search(rest):
        return _mesh_group(match[1], match[2], instruction.line)
    if match := _LISTED_GROUPS.search(rest):
        sizes = {len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", match[1])}
        if not sizes:
            return num_devices
        if len(sizes) == 1:
            return sizes.pop()
    elif "replica_groups=" not in rest:
        return num_devices
    raise _unknown("replica_groups", instruction.line)


def _mesh_group(axes: str, along: str, line: str) -> int:
    """``'a'=2,'b'=4`` and ``'b'``: the product of the axes' sizes; of ``'b':(1)2`` only the part of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    group = 1
    for part in (part.strip() for part in along.split(",")):
        match = re.fullmatch(r"'([^']+)'(?::\(\d+\)(\d+))?", part)
        if match is None or match[1] not in sizes:
            raise _unknown("replica_groups", line)
        group *= int(match[2]) if match[2] else sizes[match[1]]
    return group


def _moves(instruction: _Instruction) -> bool:
    """Whether a permute sends anything from one device to another."""
    match = _PAIRS.search(instruction.rest)
    if match is None:
        raise _unknown("source_target_pairs", instruction.line)
    return any(source != target for source, target in re.findall(r"\{(\d+),(\d+)\}", match[1]))


def _where(module: _Module, instruction: _Instruction) -> str:
    file = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.rest)
    if file:
        return f"{file[1]}:{file[2]}"
    frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    return module.frames.get(int(frame[1]), "") if frame else ""


def _frames(text: str) -> dict[int, str]:
    """``file:line`` of each stack frame, from the tables at a module's head."""
    files = {int(number): name for number, name in re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.M)}
    line = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", re.M)
    places = {int(n): f"{files.get(int(file), '')}:{at}" for n, file, at in line.findall(_table(text, "FileLocations"))}
    frame = re.compile(r"^(\d+) \{file_location_id=(\d+)", re.M)
    return {int(n): places.get(int(place), "") for n, place in frame.findall(_table(text, "StackFrames"))}


def _table(text: str, name: str) -> str:
    match = re.search(rf"^{name}\n(.*?)\n\n", text, re.M | re.S)
    return match[1] if match else ""


def _unknown(what: str, line: str) -> PassError:
    return PassError(f"cannot read compiled HLO: unknown form of {what}", where=line.strip()[:400])
