"""What mpirun says of itself is dropped; what a user's program says is not."""

from __future__ import annotations

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
