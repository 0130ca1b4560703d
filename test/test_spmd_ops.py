"""Every op of StableHLO on shards gives what it gives on one device, under every sharding that may be chosen for it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import op_sweep
import op_table
import pytest
from control_cases import WITHOUT_CASES
from jaxlib.mlir.dialects import _stablehlo_ops_gen as stablehlo_ops
from op_generators import GENERATORS

_SHORT = range(5)
_MOST_TOLD = 20
_BLOCKS, _BUNDLES = 12, 10  # of the long form


@pytest.fixture(autouse=True)
def wide_numbers() -> Iterator[None]:
    """Types of 64 bits."""
    with jax.enable_x64(True):
        yield


def _sweep(seed: int, most: int) -> tuple[Counter[str], list[op_sweep.Wrong]]:
    """One case of every op on the mesh of a seed."""
    axes = op_sweep.MESHES[seed % len(op_sweep.MESHES)]
    made = op_sweep.bundle(seed, axes, list(GENERATORS.values()), most)
    return Counter(made.cases[cut.case].name for cut in made.cuts), list(
        itertools.islice(op_sweep.check(made), _MOST_TOLD)
    )


@pytest.mark.parametrize("seed", _SHORT)
def test_shards_give_what_the_whole_gives(seed: int) -> None:
    counts, wrong = _sweep(1000 + seed * 7, 2)
    assert set(counts) == set(GENERATORS)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.long
@pytest.mark.parametrize("block", range(_BLOCKS))
def test_shards_give_what_the_whole_gives_in_many_cases(block: int) -> None:
    """Prints the seeds and how many cases each op had."""
    start, counts, wrong = time.perf_counter(), Counter[str](), list[op_sweep.Wrong]()
    seeds = range(_BUNDLES * block, _BUNDLES * (block + 1))
    for seed in seeds:
        more, found = _sweep(seed, 8)
        counts += more
        wrong += found
    seconds = time.perf_counter() - start
    print(f"seeds {seeds}: {counts.total()} cases of {len(counts)} ops, {len(wrong)} wrong, {seconds:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_op_has_cases_or_a_reason() -> None:
    dialect = {
        each.OPERATION_NAME.removeprefix("stablehlo.")
        for each in vars(stablehlo_ops).values()
        if hasattr(each, "OPERATION_NAME")
    }
    assert dialect == set(GENERATORS) | set(WITHOUT_CASES)
    assert not set(GENERATORS) & set(WITHOUT_CASES)


def test_the_table_is_up_to_date() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "op-forms.md"
    assert page.read_text() == op_table.markdown(), (
        "docs/op-forms.md is stale: python test/op_table.py > docs/op-forms.md"
    )
