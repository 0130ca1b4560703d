"""Collectives read from the text of compiled HLO, in every form that is known; others are errors."""

from __future__ import annotations

import pytest

from bactrian.driver.xla.hlo_collectives import HloCollective, read_collectives
from bactrian.passes.frame.errors import PassError

MODULE = """HloModule test, is_scheduled=true, num_partitions=8

FileNames
1 "/home/user/train.py"
2 "/home/user/model.py"

FunctionNames
1 "step"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=12 end_line=12 column=3 end_column=9}}
2 {{file_name_id=2 function_name_id=1 line=34 end_line=34 column=3 end_column=9}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

{computations}
ENTRY %main (p: f32[8,4], /*index=1*/q: f32[8]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0}} parameter(0), sharding={{replicated}}
  {lines}
  ROOT %r = f32[8,4]{{1,0}} copy(%p), metadata={{op_name="jit(step)/copy"}}
}}

"""


def read(*lines: str, computations: str = "") -> list[HloCollective]:
    return read_collectives(MODULE.format(lines="\n  ".join(lines), computations=computations))


def one(line: str) -> HloCollective:
    (found,) = read(line)
    assert found.times == 1
    return found


# f32[8,4] is 128 bytes.
@pytest.mark.parametrize(
    ("line", "kind", "group", "nbytes"),
    [
        (
            "%c = f32[8,4]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add",
            "all_reduce",
            4,
            2 * 3 / 4 * 128,
        ),
        (
            "%c = f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
            "all_reduce",
            2,
            128,
        ),
        ("%c = f32[8,4]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add", "all_reduce", 8, 2 * 7 / 8 * 128),
        ("%c = f32[8,4]{1,0} all-reduce(%p), to_apply=%add", "all_reduce", 8, 2 * 7 / 8 * 128),
        (
            "%c = f32[8,4]{1,0} all-reduce-start(f32[8,4]{1,0} %p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
            "all_reduce",
            8,
            2 * 7 / 8 * 128,
        ),
        ("%c = f32[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", "all_gather", 2, 64),
        (
            "%c = f32[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}",
            "all_gather",
            4,
            96,
        ),
        (
            "%c = f32[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={1}",
            "all_gather",
            8,
            112,
        ),
        (
            "%c = f32[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)4}, dimensions={1}",
            "all_gather",
            4,
            96,
        ),
        (
            "%c = f32[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, "
            "dimensions={1}",
            "all_gather",
            4,
            96,
        ),
        (
            "%c = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all_gather",
            4,
            96,
        ),
        (
            "%c = ((f32[2,4]{1,0}, f32[2]{0}), (f32[8,4]{1,0}, f32[8]{0})) all-gather-start(%x, %y), "
            "replica_groups=[2,4]<=[8], dimensions={0}",
            "all_gather",
            4,
            96 + 24,
        ),
        (
            "%c = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
            "reduce_scatter",
            4,
            96,
        ),
        (
            "%c = ((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[]) reduce-scatter-start(%p), replica_groups=[2,4]<=[8], "
            "dimensions={0}, to_apply=%add",
            "reduce_scatter",
            4,
            96,
        ),
        (
            "%c = (f32[2,4]{1,0}, f32[2,4]{1,0}, f32[2,4]{1,0}, /*index=3*/f32[2,4]{1,0}) all-to-all(%a, %b, %c, %d), "
            "replica_groups=[2,4]<=[8]",
            "all_to_all",
            4,
            96,
        ),
        ("%c = f32[8,4]{1,0} all-to-all(%p), replica_groups=[4,2]<=[8], dimensions={0}", "all_to_all", 2, 64),
        (
            "%c = f32[8,4]{1,0:T(8,128)} collective-permute(%p), channel_id=3, source_target_pairs={{0,1},{1,0}}",
            "collective_permute",
            8,
            128,
        ),
        ("%c = f32[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}", "collective_permute", 8, 0),
        (
            "%c = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            "collective_permute",
            8,
            128,
        ),
        ("%c = bf16[8,4]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}", "all_gather", 8, 56),
        ("%c = f8e4m3fn[16]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}", "all_gather", 8, 14),
        ("%c = pred[] all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add", "all_reduce", 8, 1.75),
        ("%c = s4[16]{0:E(4)} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}", "all_gather", 8, 7),
    ],
)
def test_forms(line: str, kind: str, group: int, nbytes: float) -> None:
    found = one(line)
    assert (found.kind, found.group, found.nbytes) == (kind, group, nbytes)


def test_several_tensors_in_one() -> None:
    found = one(
        "%all-reduce.5 = (f32[], f32[32]{0}, /*index=2*/bf16[4,4]{1,0}) all-reduce(%a, %b, %c), channel_id=5, "
        "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, "
        'metadata={op_name="jit(step)/(a/reduce_sum:b/reduce_sum)" stack_frame_id=2}'
    )
    assert found.shapes == ("f32[]", "f32[32]", "bf16[4,4]")
    assert found.result_bytes == (4, 128, 32) and found.element_bytes == (4, 4, 2)
    assert found.nbytes == 2 * 3 / 4 * (4 + 128 + 32)
    assert found.name == "all-reduce.5"
    assert found.op_name == "jit(step)/(a/reduce_sum:b/reduce_sum)"
    assert found.where == "/home/user/model.py:34"


def test_places_in_the_line_itself() -> None:
    line = '%c = f32[] all-reduce(%a), replica_groups={}, to_apply=%add, metadata={op_name="x" source_file="a.py" source_line=7}'
    assert one(line).where == "a.py:7"


def test_what_comes_back_is_not_counted_again() -> None:
    found = read(
        "%s = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        "%d = f32[8]{0} all-gather-done(%s)",
    )
    assert len(found) == 1


BODY = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %o = (s32[], f32[8]{0}) tuple(%i, %x)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

"""
WHILE = "%w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body"


def test_loops() -> None:
    (found,) = read(WHILE + ', backend_config={"known_trip_count":{"n":"5"},"x":{}}', computations=BODY)
    assert found.times == 5 and found.nbytes == 56 and found.total_bytes == 280
    (found,) = read(WHILE, computations=BODY)
    assert found.times is None and found.total_bytes == 56


def test_loops_in_loops() -> None:
    outer = BODY.replace("%body", "%outer").replace(
        "%x = f32[8]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add",
        WHILE.replace("%w", "%x") + ', backend_config={"known_trip_count":{"n":"3"}}',
    )
    outer = outer[: outer.index("%condition (")]
    line = WHILE.replace("body=%body", "body=%outer") + ', backend_config={"known_trip_count":{"n":"2"}}'
    (found,) = read(line, computations=BODY + outer)
    assert found.times == 6


def test_calls_and_branches() -> None:
    called = BODY.replace("%body", "%called")
    called = called[: called.index("%condition (")]
    assert [c.times for c in read("%c = (s32[], f32[8]) call(%t), to_apply=%called", computations=called)] == [1]
    assert [
        c.times
        for c in read("%c = (s32[], f32[8]) async-start(%t), calls=%called", computations=called)
        + read("%c = (s32[], f32[8]) async-start(%t), called_computations={%called}", computations=called)
    ] == [1, 1]
    twice = read(
        "%c = (s32[], f32[8]) conditional(%i, %t, %t), branch_computations={%called, %called}", computations=called
    )
    assert [c.times for c in twice] == [None, None]
    with pytest.raises(PassError, match="computation called has collectives, but nothing calls it"):
        read(computations=called)
    with pytest.raises(PassError, match="calls called, which is not there"):
        read("%c = f32[] call(%t), to_apply=%called")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("%c = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2}}, to_apply=%add", "replica_groups"),
        ("%c = f32[8]{0} all-reduce(%p), replica_groups=new[8], to_apply=%add", "replica_groups"),
        ("%c = f32[8]{0} all-reduce(%p), replica_groups=mesh['a'=8] {'b'}, to_apply=%add", "replica_groups"),
        ("%c = f32[8]{0} all-reduce(%p), replica_groups=mesh['a'=8] {'a':4}, to_apply=%add", "replica_groups"),
        ("%c = f32[8]{0} collective-permute(%p), channel_id=1", "source_target_pairs"),
        ("%c = f32[8]{0} collective-broadcast(%p), replica_groups={{0,1}}", "collective"),
        ("%c = f32[8]{0} ragged-all-to-all(%p), replica_groups={{0,1}}", "collective"),
        ("%c = f32[8]{0} all-new(%p)", "collective"),
        ("%c = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=1", "collective"),
        ("%c = f32[<=8]{0} all-reduce(%p), replica_groups={}, to_apply=%add", "shape"),
        ("%c = q7[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add", "shape"),
        ("%c = f32[8]{0} all-gather-start(%p), replica_groups={}, dimensions={0}", "asynchronous collective"),
        ("%c = f32[8]{0}", "instruction"),
        ("what is this", "instruction"),
    ],
)
def test_unknown_forms(line: str, what: str) -> None:
    with pytest.raises(PassError) as caught:
        read(line)
    assert caught.value.message == f"cannot read compiled HLO: unknown form of {what}"
    assert caught.value.where == line


def test_no_module() -> None:
    with pytest.raises(PassError, match="does not begin with HloModule"):
        read_collectives("module {}")
    with pytest.raises(PassError, match="no ENTRY"):
        read_collectives("HloModule x\n")


def test_totals() -> None:
    found = read(
        "%a = f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        "%b = f32[16]{0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={0}",
        "%c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0}}",
        "%d = f32[2]{0} all-reduce(%z), replica_groups=[4,2]<=[8], to_apply=%add",
    )
    assert [(one.kind, one.total_bytes) for one in found] == [
        ("all_gather", 24),
        ("all_gather", 48),
        ("collective_permute", 0),
        ("all_reduce", 8),
    ]
