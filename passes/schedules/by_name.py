"""The schedules by name."""

from __future__ import annotations

import difflib

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.schedules.eager_one_f_one_b import EagerOneFOneB
from bactrian.passes.schedules.gpipe import GPipe
from bactrian.passes.schedules.one_f_one_b import OneFOneB
from bactrian.passes.schedules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in (GPipe(), OneFOneB(), EagerOneFOneB())}
DEFAULT_SCHEDULE = OneFOneB.name


def schedule_named(name: str) -> Schedule:
    """The schedule of a name.

    Raises:
        ConfigError: there is none.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    close = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.5)
    raise ConfigError(
        f"unknown schedule {name!r}",
        fix=(f"did you mean {close[0]}? " if close else "") + f"known schedules: {', '.join(sorted(SCHEDULES))}",
    )
