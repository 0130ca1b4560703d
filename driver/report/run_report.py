"""Reports that `bactrian run --report` asks for: of every step that the script compiles."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from bactrian.driver.report.html_report import write_report
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram

PLAN_REPORT_VARIABLE = "BACTRIAN_PLAN_REPORT"  # the file for the first step of the script

_log = logging.getLogger("bactrian")
_files: dict[str, Path] = {}  # step -> its report


def report_if_asked(plan: Plan, program: StagedProgram, name: str) -> None:
    """Write the report of a step that is compiled, if `bactrian run` was told to.

    The script's first step gets the file that was named; each other one a file beside it, with the step's name in it. A
    step that is planned again writes its file again. What can't be written is logged as an error: training goes on.
    """
    asked = os.environ.get(PLAN_REPORT_VARIABLE)
    if asked is None:
        return
    path = Path(asked)
    if _files and name not in _files:
        path = path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9_]+', '_', name)}{path.suffix}")
    path = _files.setdefault(name, path)
    try:
        write_report(path, plan, program, name=name)
    except ConfigError as error:
        _log.error("%s", error)
