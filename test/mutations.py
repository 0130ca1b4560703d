"""Small changes of inputs, as a slip, a broken disk or a version of another day makes them; the same seed gives the same."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutate = Callable[[random.Random, str], str | None]
"""Gives the changed text; None where there is nothing that it could change."""

INTEGERS = ("0", "-1", "1", "2", "3", "7", "1000000", "4294967296", "9223372036854775807", "18446744073709551616")
_ELEMENTS = ("f64", "i8", "i1", "f32", "complex<f32>", "ui4", "f8E4M3FN", "index", "i64", "!stablehlo.token")
_TYPES = (
    "tensor<f32>",
    "tensor<4xf32>",
    "tensor<*xf32>",
    "tensor<0xf32>",
    "i32",
    "tensor<4x4xi32>",
    "vector<4xf32>",
    "tensor<2x!quant.uniform<i8:f32, 1.0>>",
)
_VALUES = (
    '"x"',
    "-1 : i64",
    "99 : i64",
    "3.5 : f32",
    "[]",
    "unit",
    "dense<1> : tensor<2xi64>",
    "{a = 1}",
    "@main",
    '""',
)
_VALUES += ("1 : i1", '["a", 1]', "340282366920938463463374607431768211455 : i128")
_STRINGS = (
    '""',
    '"x"',
    '"forward"',
    '"backward"',
    '"update"',
    '"state"',
    '"batch"',
    '"\\FF\\00"',
    '"stage0"',
    '"1f1b"',
)
_STRINGS += ('"stage99999999999999999999"', '"gradient"', '"stage0.forward"')
_NAMES = ("phase", "stage", "layer", "role", "x", "cluster", "result", "updates", "num_stages", "counter", "accumulate")
_OPS = ("add", "sine", "multiply", "custom_call", "while", "dot_general", "reduce", "constant", "after_all", "tuple")
_OPS += ("convolution", "optimization_barrier", "reverse", "partition_id", "all_reduce", "gather", "create_token")
_BYTES = '{}()<>[]%@"=,:-0?!\x00é '


def _one_of(pattern: str, make: Callable[[random.Random, re.Match[str]], str]) -> Mutate:
    def mutate(rng: random.Random, text: str) -> str | None:
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        match = rng.choice(found)
        return text[: match.start()] + make(rng, match) + text[match.end() :]

    return mutate


def _other(values: tuple[str, ...], around: str = "{}") -> Callable[[random.Random, re.Match[str]], str]:
    return lambda rng, match: around.format(rng.choice(values))


def _another_value(rng: random.Random, text: str) -> str | None:
    names = re.findall(r"%\w+", text)
    return _one_of(r"%\w+", _other(tuple(names)))(rng, text)


def _another_byte(rng: random.Random, text: str) -> str | None:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(_BYTES) + text[place + 1 :]


def _without_a_line(rng: random.Random, text: str) -> str | None:
    lines = text.split("\n")
    del lines[rng.randrange(len(lines))]
    return "\n".join(lines)


def _with_a_line_twice(rng: random.Random, text: str) -> str | None:
    lines = text.split("\n")
    line = rng.randrange(len(lines))
    return "\n".join(lines[: line + 1] + lines[line:])


def _with_lines_exchanged(rng: random.Random, text: str) -> str | None:
    lines = text.split("\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return "\n".join(lines)


_OF_LINES: tuple[Mutate, ...] = (_another_byte, _without_a_line, _with_a_line_twice, _with_lines_exchanged)

OF_IR: tuple[Mutate, ...] = (
    *_OF_LINES,
    _another_value,
    _one_of(r"(?<![%\w.])-?\d+(?![\w.])", _other(INTEGERS)),
    _one_of(r"\b(f32|f16|bf16|i32|i64|i1|ui32)\b", _other(_ELEMENTS)),
    _one_of(r"bactrian\.\w+ = [^,}\n]+,? ?", lambda rng, match: ""),
    _one_of(r"(bactrian\.\w+ = )([^,}\n]+)", lambda rng, match: match[1] + rng.choice(_VALUES)),
    _one_of(r'"[^"\n]*"', _other(_STRINGS)),
    _one_of(r"tensor<(\d+)x", _other(("0", "1", "3", "?", "4", "2147483648", "8x8"), "tensor<{}x")),
    _one_of(r"tensor<[^<>]*>", _other(_TYPES)),
    _one_of(r"bactrian\.(phase|stage|layer|role|num_microbatches|schedule)\b", _other(_NAMES, "bactrian.{}")),
    _one_of(r"stablehlo\.\w+", _other(_OPS, "stablehlo.{}")),
    _one_of(r'\{"\w+"\}', _other(("{}", '{"data"}', '{"model"}', "{?}", '{"data", "data"}', '{"data":(1)2}'), "{}")),
    _one_of(r"\[[\d, ]*\]", _other(("[]", "[0]", "[1, 0]", "[0, 0]", "[7]", "[-1]", "[0, 1, 2]"))),
)
_DATA_VALUES = (
    "null",
    "true",
    "{}",
    "[]",
    '""',
    '"x"',
    "-1",
    "0",
    "1",
    "1e308",
    "1e-308",
    "-0.0",
    "0.5",
    "9" * 30,
    "[1]",
)
OF_DATA: tuple[Mutate, ...] = (
    *_OF_LINES,
    _one_of(r"-?\d+(\.\d+)?(e[-+]?\d+)?", _other((*INTEGERS, *_DATA_VALUES, "1e400", "nan", "inf", "Infinity"))),
    _one_of(r'"[^"\n]*"', _other(('""', '"x"', '"data"', '"\\ud800"', '"data=0"', '"é"', '"0"', "1"))),
    _one_of(r"(?<=[:=] )[^,\n}\]]+", _other(_DATA_VALUES)),
    _one_of(r"\w+(?=\"?\s*[:=])", _other(("x", "stage", "layer", "hosts", "name", "measured", "version", "costs"))),
)


def mutated(rng: random.Random, text: str, kinds: tuple[Mutate, ...]) -> str:
    """The text after one to three changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        text = rng.choice(kinds)(rng, text) or text
    return text


def mutated_json(rng: random.Random, text: str) -> str:
    """JSON of which one value, at any depth, is another one; sound JSON, mostly of the wrong form."""
    data: Any = json.loads(text)
    places = list[tuple[Any, Any]]()
    stack = [data]
    while stack:
        top = stack.pop()
        items = list(top.items() if isinstance(top, dict) else enumerate(top))
        places += [(top, key) for key, _ in items]
        stack += [value for _, value in items if isinstance(value, (dict, list)) and value]
    container, key = rng.choice(places)
    change = rng.choice(["value", "value", "value", "remove", "rename", "nest"])
    if change == "remove":
        del container[key]
    elif change == "rename" and isinstance(container, dict):
        container[rng.choice(["x", "stage", "", "version"])] = container.pop(key)
    elif change == "nest":
        container[key] = [container[key]]
    else:
        container[key] = json.loads(rng.choice((*INTEGERS, *_DATA_VALUES)))
    return json.dumps(data)
