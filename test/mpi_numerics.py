"""Run cases under mpirun, all in one launch: ``bactrian run -n 2 test/mpi_numerics.py CASES.json``.

The file holds ``[row or trap name, …]``. Rank 0 compares with one device and prints one JSON line per case:
``{"case": …, "error": largest relative error or null, "digest": bits of the last state, "problem": "" or what differs}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import models
import numerics
from cases import Built, Case
from traps import TRAPS

import bactrian


def case_of(entry: str | numerics.Row) -> Case:
    """A trap by name, or a row of the cover."""
    if isinstance(entry, str):
        return next(case for case in TRAPS if case.name == entry)
    return models.train_case(**entry)


class References:
    """What one device gives, kept for the next row: one that differs in the plan only has the same."""

    def __init__(self) -> None:
        self._key: object = None
        self._results: list[Any] = []

    def of(self, entry: str | numerics.Row, built: Built, step: Any) -> list[Any]:
        """The result of each step."""
        key = entry if isinstance(entry, str) else {name: entry[name] for name in entry if name not in numerics.PLAN}
        if key != self._key:
            self._key, self._results, state = key, [], built.state
            for batch in built.batches:
                self._results.append(step.reference(state, *batch))
                state = built.next_state(self._results[-1])
        return self._results


def run(entry: str | numerics.Row, rank: int, references: References) -> dict[str, Any]:
    """All steps of one case; the reference on rank 0 only."""
    case = case_of(entry)
    built = case.make()
    step = bactrian.parallelize(built.step, **built.options)
    ours, worst, bits = built.state, 0.0, ""
    expected = references.of(entry, built, step) if rank == 0 else [None] * len(built.batches)
    problems = list[str]()
    for batch, theirs in zip(built.batches, expected, strict=True):
        result = step(ours, *batch)
        gathered = bactrian.gather(result)  # collective
        ours, bits = built.next_state(result), numerics.digest(gathered)
        if rank == 0:
            try:
                worst = max(worst, numerics.assert_equal_step(gathered, theirs, built.zero_gradient_leaves))
            except AssertionError as difference:
                problems.append(str(difference))
    return {"case": case.name, "error": worst, "digest": bits, "problem": "\n".join(problems)}


def main() -> None:
    """Every case of the file, then the word that all ranks reached the end."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    references = References()
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        line = run(entry, rank, references)
        if rank == 0:
            print(json.dumps(line), flush=True)
        jax.clear_caches()
    MPI.COMM_WORLD.Barrier()
    if rank == 0:
        print(json.dumps({"done": MPI.COMM_WORLD.Get_size()}), flush=True)


if __name__ == "__main__":
    main()
