"""What mpirun says of itself is dropped; what a user's program says is not."""

from __future__ import annotations

from bactrian.driver.banners import BannerFilter


def test_only_the_launchers_own_assertion_is_dropped() -> None:
    crash = b"prterun: tpp.c:83: f: Assertion `x' failed.\n[vm:1] *** Process received signal ***\n[vm:1] Signal: Aborted (6)\n"
    user = b"[worker:1] loading\nprterun: is what started me\n"
    banners = BannerFilter()
    assert banners.feed(crash + user) + banners.finish() == user
    assert banners.dropped == crash
