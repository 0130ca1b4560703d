"""Pipeline schedules as pure functions: the order of every stage's work. No MLIR, no jax.

A token names what a stage does next: ``"F3"`` is the forward of microbatch 3, ``"B3"`` its backward, ``"FB3"`` both in
one fused call (nothing separates them on the last stage of 1F1B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bactrian.passes.frame.errors import ConfigError

Order = tuple[tuple[str, ...], ...]


def gpipe(num_stages: int, num_microbatches: int, fuse_last: bool = False) -> Order:
    """All forwards, then all backwards (Huang et al. 2019, GPipe). Every stage holds all microbatches' activations.

    >>> gpipe(2, 2)
    (('F0', 'F1', 'B0', 'B1'), ('F0', 'F1', 'B0', 'B1'))
    """
    _check(num_stages, num_microbatches)
    forwards = tuple(f"F{m}" for m in range(num_microbatches))
    order = forwards + tuple(f"B{m}" for m in range(num_microbatches))
    last = tuple(f"FB{m}" for m in range(num_microbatches)) if fuse_last else order
    return (order,) * (num_stages - 1) + (last,)


def one_f_one_b(num_stages: int, num_microbatches: int, fuse_last: bool = True) -> Order:
    """One forward, one backward (Narayanan et al. 2019, PipeDream-Flush).

    Stage ``s`` runs ``num_stages - 1 - s`` forwards ahead, then alternates, so that it never holds the activations of
    more than ``num_stages - s`` microbatches.

    >>> one_f_one_b(2, 3)
    (('F0', 'F1', 'B0', 'F2', 'B1', 'B2'), ('FB0', 'FB1', 'FB2'))
    """
    _check(num_stages, num_microbatches)
    stages: list[tuple[str, ...]] = []
    for stage in range(num_stages):
        if fuse_last and stage == num_stages - 1:
            stages.append(tuple(f"FB{m}" for m in range(num_microbatches)))
            continue
        ahead = min(num_stages - 1 - stage, num_microbatches)
        tokens = [f"F{m}" for m in range(ahead)]
        for m in range(num_microbatches):
            if m + ahead < num_microbatches:
                tokens.append(f"F{m + ahead}")
            tokens.append(f"B{m}")
        stages.append(tuple(tokens))
    return tuple(stages)


def forward_only(num_stages: int, num_microbatches: int) -> Order:
    """Forward pipeline of a program without gradients.

    >>> forward_only(2, 2)
    (('F0', 'F1'), ('F0', 'F1'))
    """
    _check(num_stages, num_microbatches)
    return (tuple(f"F{m}" for m in range(num_microbatches)),) * num_stages


SCHEDULES: dict[str, Callable[[int, int, bool], Order]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def make_order(schedule: str, num_stages: int, num_microbatches: int, *, fuse_last: bool) -> Order:
    """The order of the named schedule.

    Raises:
        ConfigError: the name is unknown, or a count is below one.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"unknown schedule {schedule!r}", why=f"known: {', '.join(sorted(SCHEDULES))}", fix="choose one of these"
        )
    return SCHEDULES[schedule](num_stages, num_microbatches, fuse_last)


def parse_token(token: str) -> tuple[str, int]:
    """Kind and microbatch of a token.

    >>> parse_token("FB12")
    ('FB', 12)
    """
    kind = token.rstrip("0123456789")
    if kind not in ("F", "B", "FB") or kind == token:
        raise ConfigError(f"no such token: {token!r}", fix="tokens are F<m>, B<m> and FB<m>")
    return kind, int(token[len(kind) :])


def peak_in_flight(order: Sequence[str]) -> int:
    """Most microbatches whose forward has begun and whose backward has not ended, for one stage's order.

    >>> peak_in_flight(("F0", "F1", "B0", "B1"))
    2
    """
    live = peak = 0
    for token in order:
        kind = parse_token(token)[0]
        live += kind != "B"
        peak = max(peak, live)
        live -= kind != "F"
    return peak


def _check(num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1 or num_microbatches < 1:
        raise ConfigError(
            f"a schedule needs at least 1 stage and 1 microbatch, not {num_stages} and {num_microbatches}"
        )
