"""Makes ``docs/op-forms.md``, the table of what is done with each op on shards: ``python test/op_table.py > docs/op-forms.md``.

The forms say how; which dims can be sharded is counted over the random cases that the sweep of all ops draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from control_cases import WITHOUT_CASES
from jaxlib.mlir import ir
from op_cases import one_device_module
from op_generators import GENERATORS

from bactrian.passes.frame.context import make_context
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.spmd.form_table import FORMS, Form
from bactrian.passes.spmd.op_rules import annotate_rules, rule_of
from bactrian.passes.spmd.sharding_rules import Dims, Rule

_CASES = 30  # of each op

_HEAD = """# What each op is on shards

Made by `python test/op_table.py`; do not edit. `partition` writes an op whose dims are sharded in its local form; an
op without one is whole: every device does all of it. `rule_of` says for one op of a program which of its dims can be
sharded: the choice of shardings offers just these.

Here they are counted over {cases} random cases of each op, of dims of more than one element. *Operands* and *results*
say how many of their dims can be sharded; *reduced*, in how many cases a dim can be that is in operands only, of which
devices combine their results.

| op | on shards | whole dims | operands | results | reduced |
|---|---|---|---|---|---|"""

_WITHOUT = """
## Without cases

| op | why |
|---|---|"""


def markdown() -> str:
    """The text of ``docs/op-forms.md``."""
    lines = [_HEAD.format(cases=_CASES)]
    for name in sorted(GENERATORS):
        form = FORMS.get(f"stablehlo.{name}")
        how, narrow = ("whole", "all") if form is None else (_first_sentence(form.write), _whole_dims(form))
        lines.append(f"| `{name}` | {how} | {narrow} | {' | '.join(_counts(name))} |")
    lines.append(_WITHOUT)
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(WITHOUT_CASES.items())]
    return "\n".join(lines) + "\n"


def _whole_dims(form: Form) -> str:
    return _first_sentence(form.narrow) if inspect.getdoc(form.narrow) else "none for its form's sake"


def _first_sentence(function: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|").replace("``", "`")


def _counts(name: str) -> tuple[str, str, str]:
    """Of the operands' dims how many can be sharded, of the results', and in how many cases a reduced one."""
    found = np.zeros((2, 2), dtype=np.int64)
    reduced = 0
    cases = [GENERATORS[name](np.random.default_rng(seed)) for seed in range(_CASES)]
    with make_context():
        module = ir.Module.parse(one_device_module(cases))
        annotate_rules(module)
        for case, view in zip(cases, list(body(main_function(module)).operations)[:-1], strict=True):
            rule = rule_of(view.operation)
            shapes = [each.shape for each in case.reads], [each.shape for each in case.results]
            tensors = ((), ()) if rule is None else (rule.operands, rule.results)
            for side in range(2):
                found[side] += _sharded_dims(rule, tensors[side], shapes[side])
            if rule is not None:
                reduced += any(rule.sizes[factor] > 1 for factor in rule.reduction - rule.replicated - rule.permuted)
    operands, results = (f"{some} of {all_}" if all_ else "" for some, all_ in found.tolist())
    return operands, results, str(reduced or "")


def _sharded_dims(rule: Rule | None, tensors: Sequence[Dims], shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """The dims of more than one element that can be sharded, and all of these."""
    some = 0
    if rule is not None:
        whole = rule.replicated | rule.permuted
        some = sum(
            size > 1 and any(factor not in whole and rule.sizes[factor] > 1 for factor in dim)
            for dims, shape in zip(tensors, shapes, strict=False)  # a rule may leave out the last operands
            for dim, size in zip(dims, shape, strict=True)
        )
    return some, sum(size > 1 for shape in shapes for size in shape)


if __name__ == "__main__":
    print(markdown(), end="")
