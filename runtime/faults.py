"""Failures on demand, for tests: ``BACTRIAN_FAULTS="rank=1,step=2,point=before_send,action=raise"``.

Unset, `ACTIVE` is None and nothing is checked. Each fault happens once, and says on stderr when it does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from bactrian.passes.frame.errors import ConfigError

POINTS = (
    "import",
    "init",
    "plan",
    "compile",
    "in_step",
    "before_send",
    "after_recv",
    "save",
    "exit",
)
_ONCE = ("import", "init", "plan", "compile", "exit")  # points outside of steps
ACTIONS = ("raise", "kill", "exit", "stop", "sleep")


class InjectedFault(Exception):
    """Raised by ``action=raise``."""


@dataclass
class Fault:
    """One failure. ``step`` None: the first time the point is reached; points outside of steps know no step."""

    rank: int
    point: str
    action: str
    step: int | None = None
    seconds: float = 3600.0
    done: bool = False


def parse(text: str) -> Fault | None:
    """The fault that the text asks for.

    Raises:
        ConfigError: unknown key, point or action.
    """
    if not text.strip():
        return None
    pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in text.split(","))}
    unknown = sorted(set(pairs) - {"rank", "step", "point", "action", "seconds"})
    if unknown:
        _refuse(text, f"unknown key {unknown[0]!r}", "keys are rank, step, point, action, seconds")
    point, action = pairs.get("point", ""), pairs.get("action", "")
    if point not in POINTS:
        _refuse(text, f"unknown point {point!r}", f"points are {', '.join(POINTS)}")
    if action not in ACTIONS:
        _refuse(text, f"unknown action {action!r}", f"actions are {', '.join(ACTIONS)}")
    try:
        step = int(pairs["step"]) if "step" in pairs and point not in _ONCE else None
        return Fault(int(pairs.get("rank", "0")), point, action, step, float(pairs.get("seconds", "3600")))
    except ValueError:
        _refuse(text, "not a number", "rank and step are integers, seconds a number")


def _refuse(text: str, why: str, fix: str) -> NoReturn:
    raise ConfigError("cannot read BACTRIAN_FAULTS", where=text, why=why, fix=fix)


def own_rank() -> int:
    """This process's rank as its launcher tells it; 0 without one."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def own_fault() -> Fault | None:
    """The fault that the environment asks of this rank."""
    fault = parse(os.environ.get("BACTRIAN_FAULTS", ""))
    return fault if fault is not None and fault.rank == own_rank() else None


ACTIVE: Fault | None = own_fault()

_step = 0


def set_step(step: int) -> None:
    """Tell which step is under way."""
    global _step
    _step = step


def at(point: str) -> None:
    """A named point was reached."""
    fault = ACTIVE
    if fault is None or fault.done or fault.point != point or fault.step not in (None, _step):
        return
    fault.done = True
    what = f"fault injected on rank {fault.rank} at {point}, step {_step}, unix time {time.time():.3f}"
    print(f"bactrian: {fault.action}: {what}", file=sys.stderr, flush=True)
    match fault.action:
        case "raise":
            raise InjectedFault(what)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(17)
        case _:
            time.sleep(fault.seconds)
