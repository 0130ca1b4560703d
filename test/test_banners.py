"""What mpirun says of itself is dropped; what a user's program says is not."""

from __future__ import annotations

import pytest

from bactrian.driver.launch.banners import BannerFilter, GlooFilter


def test_only_the_launchers_own_assertion_is_dropped() -> None:
    crash = b"prterun: tpp.c:83: f: Assertion `x' failed.\n[vm:1] *** Process received signal ***\n[vm:1] Signal: Aborted (6)\n"
    user = b"[worker:1] loading\nprterun: is what started me\n"
    banners = BannerFilter()
    assert banners.feed(b"\0" + crash + user) + banners.finish() == user
    assert banners.dropped == crash


def test_lines_of_gloo_are_taken_out() -> None:
    gloo = b"[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    text = b"loss 0.5\n" + gloo + b"[Gl\n[x] [Gloo] Rank 1\n" + gloo + b"end [Gloo] Rank 2"
    kept = b"loss 0.5\n[Gl\n[x] [Gloo] Rank 1\nend [Gloo] Rank 2"
    for size in (1, 3, 7, len(text)):
        one = GlooFilter()
        passed = b"".join(one.feed(text[at : at + size]) for at in range(0, len(text), size))
        assert passed + one.finish() == kept


def test_what_follows_the_coordination_services_end_is_kept_back() -> None:
    log = b"F1122 04:36:23.719114   26430 client.h:80] Terminating process because ...\n    @     0x7f\nFatal Python error\nx"
    banners = BannerFilter()
    assert banners.feed(b"E1122 is mine\n" + log[:90]) == b"E1122 is mine\n"
    assert banners.feed(log[90:]) + banners.finish() == b""
    assert banners.dropped == log


RULE = b"-" * 74 + b"\n"
BANNER = RULE + b"prterun noticed that process rank 1 with PID 5 on node a exited on\nsignal 9 (Killed).\n" + RULE


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_banners_are_taken_out_and_all_else_passes(size: int) -> None:
    text = (
        b"before\n" + BANNER + b"between\n" + RULE + b"a table of the user\n" + RULE + b"Abort(1) on node 3\nno newline"
    )
    banners = BannerFilter()
    passed = b"".join(banners.feed(text[i : i + size]) for i in range(0, len(text), size)) + banners.finish()
    assert passed == b"before\nbetween\n" + RULE + b"a table of the user\n" + RULE + b"no newline"
    assert banners.dropped == BANNER + b"Abort(1) on node 3\n"


def test_a_prompt_passes_at_once() -> None:
    banners = BannerFilter()
    assert banners.feed(b"\rstep 3") == b"\rstep 3"
    assert banners.feed(b"\rstep 4\nx") == b"\rstep 4\nx"
    assert banners.feed(b"-----") == b""  # may become a rule
    assert banners.release() == b"-----"
    assert banners.feed(b"\n" + RULE) == b"\n"
    assert banners.release() == RULE
    assert banners.feed(RULE + b"a\nb\n") == b""
    assert banners.feed(b"c\n") == RULE + b"a\nb\nc\n"
    assert banners.feed(BANNER[:-10]) == banners.release() == b""
    assert banners.finish() == b""
