"""The program in stages of a plan that was saved."""

from __future__ import annotations

from pathlib import Path

from jaxlib.mlir import ir

from bactrian.driver.planning.extract import extract
from bactrian.passes.frame import registry
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError, PassError, ProgramError
from bactrian.passes.frame.module_text import parse_module
from bactrian.passes.plan.schema import STAGED_FILE, Plan
from bactrian.runtime.staged_program import StagedProgram

_AGAIN = "save the plan once more, with `bactrian plan --save`"


def load_program(directory: str | Path, plan: Plan) -> StagedProgram | None:
    """The staged program in the folder of a saved plan; None where there is only ``plan.json``.

    Args:
        directory: written by ``bactrian plan --save``, or the plan file in it.
        plan: the plan that was saved there.

    Raises:
        ConfigError: the staged program can't be read, or belongs to another plan.
    """
    folder = Path(directory)
    path = (folder if folder.is_dir() else folder.parent) / STAGED_FILE
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}", fix=_AGAIN) from None
    with make_context():
        try:
            module = parse_module(text, str(path))
            registry.load_contracts(registry.load("schedule-microbatches").ensures)(module)
            program = extract(module)
        except (ir.MLIRError, ProgramError, PassError) as error:
            raise ConfigError(f"cannot read {path}", why=str(error).partition("\n")[0], fix=_AGAIN) from None
    turns = {plan.num_microbatches} | ({1} if plan.num_stages == 1 else set[int]())  # one stage may loop inside
    if program.num_stages != plan.num_stages or program.num_microbatches not in turns:
        raise ConfigError(f"{STAGED_FILE} and plan.json in {path.parent} belong to different plans", fix=_AGAIN)
    return program
