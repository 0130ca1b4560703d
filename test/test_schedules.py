"""Invariants of the pipeline schedules."""

from __future__ import annotations

import doctest
from functools import lru_cache
from itertools import product

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.stages import schedules
from bactrian.passes.stages.schedules import make_order, peak_in_flight

parse_token = lru_cache(maxsize=None)(schedules.parse_token)


def check(name: str, stages: int, microbatches: int, fuse: bool) -> None:
    order = make_order(name, stages, microbatches, fuse_last=fuse)
    assert len(order) == stages
    for stage, tokens in enumerate(order):
        parsed = [parse_token(t) for t in tokens]
        forwards = [m for kind, m in parsed if "F" in kind]
        backwards = [m for kind, m in parsed if "B" in kind]
        assert forwards == backwards == list(range(microbatches))
        seen: set[int] = set()
        for kind, m in parsed:
            assert kind == "FB" or (kind == "F") == (m not in seen)
            seen.add(m)
        fused = fuse and stage == stages - 1
        assert all((kind == "FB") == fused for kind, _ in parsed)
        most = microbatches if name == "gpipe" else min(stages - stage, microbatches)
        assert peak_in_flight(tokens) == (1 if fused else most)
    assert completes(order)


def completes(order: schedules.Order) -> bool:
    """A forward waits for the stage before, a backward for the stage after: does it all get done?"""
    at, done = [0] * len(order), set[tuple[str, int, int]]()
    progress = True
    while progress:
        progress = False
        for stage, tokens in enumerate(order):
            while at[stage] < len(tokens):
                kind, m = parse_token(tokens[at[stage]])
                if "F" in kind and stage > 0 and ("F", stage - 1, m) not in done:
                    break
                if "B" in kind and stage < len(order) - 1 and ("B", stage + 1, m) not in done:
                    break
                done |= {(k, stage, m) for k in kind}
                at[stage] += 1
                progress = True
    return all(i == len(tokens) for i, tokens in zip(at, order, strict=True))


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize("fuse", [False, True])
def test_invariants_on_a_sample(name: str, fuse: bool) -> None:
    for stages, microbatches in product((1, 2, 3, 7, 64), (1, 2, 5, 8, 128)):
        check(name, stages, microbatches, fuse)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize("fuse", [False, True])
def test_invariants_of_many(name: str, fuse: bool) -> None:
    for stages, microbatches in product(range(1, 65), (*range(1, 17), *range(17, 129, 8))):
        check(name, stages, microbatches, fuse)


@pytest.mark.parametrize("stages, microbatches", [(0, 1), (1, 0), (-1, 4)])
def test_counts_below_one_are_refused(stages: int, microbatches: int) -> None:
    for make in (schedules.gpipe, schedules.one_f_one_b, schedules.forward_only):
        with pytest.raises(ConfigError, match="at least 1 stage"):
            make(stages, microbatches)


def test_an_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown schedule 'zigzag'.*1f1b, gpipe"):
        make_order("zigzag", 2, 2, fuse_last=True)


@pytest.mark.parametrize("token", ["", "F", "3", "X1", "BF2"])
def test_a_malformed_token_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="no such token"):
        parse_token(token)


def test_examples() -> None:
    assert doctest.testmod(schedules).failed == 0
