"""Types of command-line arguments: what they accept, and what they say of everything else."""

from __future__ import annotations

import argparse

from bactrian.passes.plan.pipeline_record import FOUND

_MOST_RANKS = 65536


def count(text: str) -> int:
    """A number of ranks, devices, stages or microbatches."""
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_RANKS:
        raise argparse.ArgumentTypeError(f"should be a whole number from 1 to {_MOST_RANKS}, got {text!r}")
    return int(text)


def count_or_auto(text: str) -> int | str:
    """A number, or ``auto`` for the one that is found."""
    return text if text == FOUND else count(text)


def whole_number(text: str) -> int:
    """A number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be a whole number, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a number of seconds above 0, got {text!r}")
    return value
