"""Every op of StableHLO on shards gives what it gives on one device, under every sharding that may be chosen for it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import op_sweep
import op_table
import pytest
from control_cases import WITHOUT_CASES
from jaxlib.mlir.dialects import _stablehlo_ops_gen as stablehlo_ops
from op_generators import GENERATORS
from stablehlo_interpreter import interpreted, is_interpreted

from bactrian.passes.spmd.form_table import FORMS, Form
from bactrian.passes.spmd.forms.elementwise import same_op

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


@pytest.mark.parametrize("seed", range(20, 30))
def test_ops_send_what_is_predicted(seed: int) -> None:
    axes = op_sweep.MESHES[seed % len(op_sweep.MESHES)]
    predicted, sent = op_sweep.bytes_of_ops(op_sweep.bundle(seed, axes, list(GENERATORS.values()), 8))
    assert sent == pytest.approx({kind: nbytes for kind, nbytes in predicted.items() if nbytes})


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


def test_a_wrong_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose partial sums nobody adds up."""
    made = op_sweep.bundle(5, op_sweep.MESHES[0], [GENERATORS["dot_general"]] * 8, 4)
    monkeypatch.setitem(FORMS, "stablehlo.dot_general", Form(same_op))
    wrong = list(op_sweep.check(made))
    summed = [cut for cut in made.cuts if cut.strategy.reductions]
    assert len(wrong) >= len(summed) / 2 > 0
    assert "sdy.mesh" in str(wrong[0]) and "seed 5" in str(wrong[0])


def test_one_device_gives_what_the_interpreter_gives() -> None:
    """The judge of the sweep is XLA on one device; here it is judged."""
    random = [np.random.default_rng(seed) for seed in range(4)]
    cases = [generator(each) for generator in GENERATORS.values() for each in random]
    cases = [case for case in cases if is_interpreted(case)]
    assert len({case.name for case in cases}) > 50
    for case, wholes in zip(cases, op_sweep.expected(cases), strict=True):
        for whole, other in zip(wholes, interpreted(case), strict=True):
            message = op_sweep.difference(case, other.astype(whole.dtype), (), whole)
            # Of 0.0 and -0.0 either is the larger one to XLA.
            assert not message or np.array_equal(whole, other, equal_nan=True), f"{message}\n{case.module()}"


def test_every_op_has_cases_or_a_reason() -> None:
    dialect = {
        each.OPERATION_NAME.removeprefix("stablehlo.")
        for each in vars(stablehlo_ops).values()
        if hasattr(each, "OPERATION_NAME")
    }
    known = set(GENERATORS) | set(WITHOUT_CASES)
    assert dialect <= known
    assert known - dialect <= {"collective_reduce"}  # jaxlib 0.11 has it
    assert not set(GENERATORS) & set(WITHOUT_CASES)


def test_the_table_is_up_to_date() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "op-forms.md"
    assert page.read_text() == op_table.markdown(), (
        "docs/op-forms.md is stale: python test/op_table.py > docs/op-forms.md"
    )
