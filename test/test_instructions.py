"""Instruction lists: what they contain, and that every defect in them is found."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
from staged_programs import Builder, chain, order_of, random_program

from bactrian.passes.frame.errors import ConfigError, PassError
from bactrian.passes.schedules.by_name import SCHEDULES
from bactrian.runtime import instruction_builder, instructions
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams
from bactrian.runtime.instructions import (
    Arrive,
    Copy,
    Free,
    Instruction,
    InstructionStream,
    Load,
    Recv,
    Run,
    Send,
    Wait,
)
from bactrian.runtime.staged_program import ResultPiece, StagedProgram


def reads(x: Instruction) -> set[int]:
    match x:
        case Run(inputs=inputs):
            return set(inputs)
        case Send(slot=slot) | Arrive(slot=slot) | Wait(slot=slot) | Copy(source=slot):
            return {slot}
        case Free(slots=slots):
            return set(slots)
        case _:
            return set()


def writes(x: Instruction) -> set[int]:
    match x:
        case Run(outputs=outputs, donated=donated):
            return {*outputs, *donated}
        case Load(slot=slot) | Recv(slot=slot) | Arrive(slot=slot) | Copy(target=slot):
            return {slot}
        case Free(slots=slots):
            return set(slots)
        case _:
            return set()


def mutated(
    lists: tuple[InstructionStream, ...], rank: int, instructions: list[Instruction]
) -> list[InstructionStream]:
    changed = list(lists)
    changed[rank] = replace(lists[rank], instructions=tuple(instructions))
    return changed


PROGRAMS = [
    (chain(3, 4), (0, 1, 2)),
    (chain(4, 3, "gpipe"), (0, 1, 0, 1)),
    (chain(2, 2, "gpipe"), (0, 0)),
    (chain(4, 8), (0, 1, 0, 1)),
]


@pytest.mark.parametrize("program, ranks", PROGRAMS)
def test_a_dropped_instruction_is_found(program: StagedProgram, ranks: tuple[int, ...]) -> None:
    lists = build_streams(program, ranks)
    check_streams(lists)
    for rank, one in enumerate(lists):
        for i in range(len(one.instructions)):
            with pytest.raises(PassError):
                check_streams(mutated(lists, rank, [*one.instructions[:i], *one.instructions[i + 1 :]]))


@pytest.mark.parametrize("program, ranks", PROGRAMS)
def test_a_doubled_instruction_is_found(program: StagedProgram, ranks: tuple[int, ...]) -> None:
    lists = build_streams(program, ranks)
    for rank, one in enumerate(lists):
        for i, x in enumerate(one.instructions):
            with pytest.raises(PassError, match=r"(?s)rank \d, instruction \d+: |rank \d, at its end"):
                check_streams(mutated(lists, rank, [*one.instructions[: i + 1], x, *one.instructions[i + 1 :]]))


@pytest.mark.parametrize("program, ranks", PROGRAMS)
def test_swapped_dependent_instructions_are_found(program: StagedProgram, ranks: tuple[int, ...]) -> None:
    lists, found = build_streams(program, ranks), 0
    for rank, one in enumerate(lists):
        for i, (a, b) in enumerate(zip(one.instructions, one.instructions[1:], strict=False)):
            if (
                writes(a) & (reads(b) | writes(b))
                or reads(a) & writes(b)
                or (isinstance(a, Send) and writes(b) & reads(a))
            ):
                if isinstance(a, Run) and isinstance(b, Run) and not writes(a) & reads(b) and not reads(a) & writes(b):
                    continue
                with pytest.raises(PassError):
                    swapped = [*one.instructions[:i], b, a, *one.instructions[i + 2 :]]
                    check_streams(mutated(lists, rank, swapped))
                found += 1
    assert found > 4


@pytest.mark.parametrize("changes", [{"tag": 99}, {"nbytes": 1}, {"destination": 0}])
def test_a_send_that_fits_no_receive_is_found(changes: dict[str, int]) -> None:
    lists = build_streams(chain(3, 2), (0, 1, 2))
    at = next(i for i, x in enumerate(lists[1].instructions) if isinstance(x, Send) and x.destination == 2)
    x = lists[1].instructions[at]
    assert isinstance(x, Send)
    changed = [*lists[1].instructions[:at], replace(x, **changes), *lists[1].instructions[at + 1 :]]
    with pytest.raises(PassError, match=r"rank \d, instruction \d+"):
        check_streams(mutated(lists, 1, changed))


def test_a_receive_of_another_dtype_is_found() -> None:
    lists = build_streams(chain(2, 2), (0, 1))
    changed = [replace(x, dtype="int32") if isinstance(x, Recv) else x for x in lists[1].instructions]
    with pytest.raises(PassError, match=r"float32\[.*where int32\["):
        check_streams(mutated(lists, 1, changed))


def test_two_ranks_that_send_before_they_post_deadlock() -> None:
    lists = build_streams(chain(2, 1), (0, 1))
    late = [sorted(one.instructions, key=lambda x: isinstance(x, Recv)) for one in lists]
    broken = [replace(one, instructions=tuple(x)) for one, x in zip(lists, late, strict=True)]
    with pytest.raises(PassError):
        check_streams(broken)


def test_one_stage_on_one_rank_is_minimal() -> None:
    (only,) = build_streams(chain(1, 2), (0,))
    kinds = [type(x).__name__ for x in only.instructions]
    microbatch = ["Load", "Run", "Free"]
    assert kinds == ["Run", *microbatch, *microbatch, "Run", "Run", "Free", "Copy"]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("stages, microbatches", [(1, 1), (2, 1), (2, 4), (4, 2), (4, 8), (8, 16)])
def test_activations_in_flight(schedule: str, stages: int, microbatches: int) -> None:
    report = check_streams(build_streams(chain(stages, microbatches, schedule), tuple(range(stages))))
    for stage in range(stages):
        assert report.in_flight[stage] == SCHEDULES[schedule].in_flight(stage, stages, microbatches)


def test_one_message_per_value_microbatch_and_rank() -> None:
    stages, microbatches = 4, 5
    apart = check_streams(build_streams(chain(stages, microbatches), (0, 1, 2, 3), broadcast_results=False))
    # forward, backward, the skip; the shared state; the norms
    assert apart.num_messages == microbatches * (3 + 3 + 1) + 1 + stages * (stages - 1)
    folded = check_streams(build_streams(chain(stages, microbatches), (0, 1, 0, 1), broadcast_results=False))
    # the skip and the next stage's input are one message now, as are a norm's two readers
    assert folded.num_messages == microbatches * (3 + 3) + 1 + stages


def test_results_reach_every_rank() -> None:
    lists = build_streams(chain(3, 2), (0, 1, 2))
    for one in lists:
        assert [r.result for r in one.results if r.updates is None] == [4, 5, 6]
        assert len({r.slot for r in one.results}) == len(one.results)
    alone = build_streams(chain(3, 2), (0, 1, 2), broadcast_results=False)
    assert [[r.result for r in one.results if r.updates is None] for one in alone] == [[5, 6], [], [4]]


def test_receives_are_posted_ahead_but_not_all_at_once() -> None:
    one = build_streams(chain(4, 16), (0, 1, 2, 3))[2]
    outstanding = most = 0
    for x in one.instructions:
        outstanding += isinstance(x, Recv) - isinstance(x, Arrive)
        most = max(most, outstanding)
    assert 2 <= most <= 8


@pytest.mark.parametrize("ranks", [(0,), (0, 2), (0, 1, 2)])
def test_ranks_that_do_not_fit_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="cannot deal 2 stages"):
        build_streams(chain(2, 2), ranks)


def test_an_impossible_order_is_explained() -> None:
    program = chain(2, 2, "gpipe")
    order = (("F0", "B0", "F1", "B1"), ("F1", "F0", "B0", "B1"))
    with pytest.raises(PassError, match=r"(?s)can't be carried out.*stage1.forward of microbatch 1 waits"):
        build_streams(replace(program, order=order), (0, 1))


def test_a_missing_token_is_explained() -> None:
    program = chain(2, 2)
    with pytest.raises(PassError, match=r"stage 1 never runs stage1\.forward_backward for microbatch 1"):
        build_streams(replace(program, order=(program.order[0], ("FB0",))), (0, 1))


def test_a_read_across_stages_without_transfer_is_explained() -> None:
    b = Builder()
    w = b.argument(0, "state", 0)
    b.call("stage1.update", [w], [b.value(1)], 1, "update")
    with pytest.raises(PassError, match=r"stage1\.update reads value 0 of stage 0"):
        build_streams(b.program("gpipe", (("F0",), ("F0",)), 1), (0, 1))


def test_a_result_that_nothing_makes_is_explained() -> None:
    b = Builder()
    b.results.append(ResultPiece(0, b.value(0)))
    with pytest.raises(PassError, match="result 0 reads value 0"):
        build_streams(b.program("gpipe", (("F0",),), 1), (0,))


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_batch_pieces_are_loaded_while_the_pipeline_fills(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget, all that is not needed before the first wait comes right before it; without, all where needed."""
    monkeypatch.setattr(instruction_builder, "_LOAD_AHEAD_BYTES", budget)
    both = build_streams(chain(2, 6, "1f1b"), (0, 1))
    check_streams(both)
    loads = [[i for i, x in enumerate(each.instructions) if isinstance(x, Load)] for each in both]
    assert max(map(len, loads)) == 6
    for each, at in zip(both, loads, strict=True):
        first_wait = next(i for i, x in enumerate(each.instructions) if isinstance(x, Arrive))
        assert any(i > first_wait for i in at) == (bool(at) and budget == 0)


def test_lists_are_deterministic() -> None:
    assert build_streams(chain(4, 8), (0, 1, 0, 1)) == build_streams(chain(4, 8), (0, 1, 0, 1))


def generated(seeds: range) -> None:
    for seed in seeds:
        program, ranks = random_program(seed)
        try:
            check_streams(build_streams(program, ranks, broadcast_results=seed % 2 == 0, lookahead=seed % 4))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_no_generated_program_deadlocks_short() -> None:
    generated(range(200))


@pytest.mark.long
def test_no_generated_program_deadlocks() -> None:
    generated(range(10_000))


@pytest.mark.long
def test_schedules_never_deadlock() -> None:
    for stages in (1, 2, 5, 16, 64):
        for microbatches in (1, 3, 32, 128):
            for ranks in (stages, max(1, stages // 4)):
                program = chain(stages, microbatches)
                order = order_of("1f1b", stages, microbatches, fuse_last=True)
                check_streams(build_streams(replace(program, order=order), tuple(s % ranks for s in range(stages))))


def test_examples() -> None:
    assert doctest.testmod(instructions).failed == 0
