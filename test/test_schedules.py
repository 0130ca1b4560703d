"""Invariants of the pipeline schedules, and that only their folder knows their names."""

from __future__ import annotations

import ast
import doctest
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.schedules import eager_one_f_one_b, gpipe, one_f_one_b, schedule
from bactrian.passes.schedules.by_name import SCHEDULES, schedule_named
from bactrian.passes.schedules.schedule import Order, fused, peak_in_flight

ROOT = Path(__file__).resolve().parent.parent

MOST_IN_FLIGHT = {
    "gpipe": lambda stage, stages, microbatches: microbatches,
    "1f1b": lambda stage, stages, microbatches: min(microbatches, stages - stage),
    "eager-1f1b": lambda stage, stages, microbatches: min(microbatches, 2 * (stages - stage) - 1),
}

parse_token = lru_cache(maxsize=None)(schedule.parse_token)


def check(name: str, stages: int, microbatches: int, fuse: bool) -> None:
    order = SCHEDULES[name].order(stages, microbatches)
    if fuse:
        order = (*order[:-1], fused(order[-1]))
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
        last = fuse and stage == stages - 1
        assert all((kind == "FB") == last for kind, _ in parsed)
        most = MOST_IN_FLIGHT[name](stage, stages, microbatches)
        assert peak_in_flight(tokens) == (1 if last else most)
        assert SCHEDULES[name].in_flight(stage, stages, microbatches) == most
    assert completes(order)


def completes(order: Order) -> bool:
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


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("fuse", [False, True])
def test_invariants_on_a_sample(name: str, fuse: bool) -> None:
    for stages, microbatches in product((1, 2, 3, 7, 64), (1, 2, 5, 8, 128)):
        check(name, stages, microbatches, fuse)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("fuse", [False, True])
def test_invariants_of_many(name: str, fuse: bool) -> None:
    for stages, microbatches in product(range(1, 65), (*range(1, 17), *range(17, 129, 8), 128)):
        check(name, stages, microbatches, fuse)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_fused_stages_do_nothing_between_a_forward_and_its_backward(name: str) -> None:
    for stages, microbatches in product((1, 2, 5), (1, 2, 5)):
        for stage, tokens in enumerate(SCHEDULES[name].order(stages, microbatches)):
            if SCHEDULES[name].fuses(stage, stages):
                assert tokens == tuple(f"{kind}{m}" for m in range(microbatches) for kind in "FB")


def test_1f1b_and_its_eager_form_fuse_the_last_stage_and_gpipe_none() -> None:
    for name in ("1f1b", "eager-1f1b"):
        assert [SCHEDULES[name].fuses(stage, 3) for stage in range(3)] == [False, False, True]
    assert [SCHEDULES["gpipe"].fuses(stage, 3) for stage in range(3)] == [False, False, False]


@pytest.mark.parametrize("stages, microbatches", [(0, 1), (1, 0), (-1, 4)])
def test_counts_below_one_are_refused(stages: int, microbatches: int) -> None:
    for each in SCHEDULES.values():
        with pytest.raises(ConfigError, match="at least 1 stage"):
            each.order(stages, microbatches)


def test_an_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)unknown schedule 'zigzag'.*fix: known schedules: 1f1b, eager-1f1b, gpipe"
    ):
        schedule_named("zigzag")
    with pytest.raises(ConfigError, match=r"(?s)unknown schedule '1b1f'.*did you mean 1f1b\?"):
        schedule_named("1b1f")


@pytest.mark.parametrize("token", ["", "F", "3", "X1", "BF2"])
def test_a_malformed_token_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="no such token"):
        parse_token(token)


def test_only_the_schedules_know_their_names() -> None:
    files = [path for folder in ("passes", "driver", "runtime") for path in (ROOT / folder).rglob("*.py")]
    others = [path for path in files if path.parent.name != "schedules"]
    assert len(files) > len(others) > 100
    said = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in others
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in SCHEDULES
    ]
    assert not said, f"ask a Schedule instead: {', '.join(said)}"


@pytest.mark.parametrize("module", [schedule, gpipe, one_f_one_b, eager_one_f_one_b])
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
