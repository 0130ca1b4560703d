"""What is refused of a traced step: values that go around the gradient boundary, gradients that nothing can be made of."""

from __future__ import annotations

from collections.abc import Sequence

from bactrian.driver.capture.argument_info import ArgumentInfo, ResultInfo
from bactrian.driver.capture.gradient_boundary import DIFFERENTIATED
from bactrian.driver.capture.jaxpr_dataflow import JaxprDataflow, is_call
from bactrian.passes.frame.errors import ProgramError


def refuse_unreduced(
    flow: JaxprDataflow, arguments: Sequence[ArgumentInfo], results: Sequence[ResultInfo], begin: str
) -> None:
    """Nothing below the boundary may depend on one microbatch other than through the boundary.

    Args:
        begin: the line where the step begins, to blame for a leaf of the batch that it returns.
    """
    batch = [info.number for info in arguments if info.role == "batch"]
    tainted, by = flow.tainted(batch)
    for info, value in zip(results, flow.outputs, strict=True):
        if value not in tainted:
            continue
        below = set(flow.boundary.outputs)
        line = by[value].line if value in by else begin
        for operation in flow.ancestors([value]):  # the first that mixes both sides, else what made the result
            if below.intersection(operation.inputs):
                below.update(operation.outputs)
                if tainted.intersection(operation.inputs):
                    line = operation.line
                    break
        raise ProgramError(
            f"{info.path} depends on the batch other than through the gradient boundary",
            where=line,
            why="what is below the boundary runs once per step, and each microbatch has a value of its own",
            fix="compute it in the loss function and return it as aux, as in `(loss, aux), grads = "
            "bactrian.value_and_grad(loss_fn, has_aux=True)(params)`: aux_reduction says how microbatches are put "
            "together (a mean by default); or use one microbatch",
        )


def refuse_gradients_of_rows(flow: JaxprDataflow, arguments: Sequence[ArgumentInfo], num_microbatches: int) -> None:
    """Refuse gradients of what belongs to one microbatch and is no leaf of the batch: how to put them together is not known."""
    batch = [info for info in arguments if info.role == "batch"]
    rows = {info.shape[0] // num_microbatches for info in batch}
    of_batch, _ = flow.tainted(info.number for info in batch)
    of_arguments, _ = flow.tainted(range(flow.num_inputs))
    for operation in flow.operations:
        if not is_call(operation.equation, DIFFERENTIATED):
            continue
        for value, atom in zip(operation.inputs, operation.equation.invars, strict=True):
            shape = atom.aval.shape
            if value in of_batch:
                what = "is computed from the batch"
            elif value not in of_arguments and shape[:1] and shape[0] in rows:
                what = "has as many rows as a microbatch, and comes from no argument"
            else:
                continue
            raise ProgramError(
                f"cannot put the gradients of {num_microbatches} microbatches together: what they are taken of "
                f"({atom.aval.str_short()}) {what}",
                where=operation.line,
                why="each microbatch has such a value of its own",
                fix="take the gradient with respect to a leaf of the batch as the step was given it, outside of jitted "
                "functions, and compute the rest inside of the loss: it gets a row for each row of the batch",
            )


def refuse_unused_gradients(flow: JaxprDataflow) -> None:
    """Refuse a step that trains nothing."""
    gradients = {out for out, kind in zip(flow.boundary.outputs, flow.kinds, strict=True) if kind == "gradient"}
    read = {*flow.outputs, *(value for operation in flow.below() for value in operation.inputs)}
    if gradients and gradients.isdisjoint(read):
        raise ProgramError(
            "the gradients reach no result of the step: it would train nothing",
            where=flow.boundary.line,
            why="a step changes only what it returns: objects that it updates in place are copies",
            fix="return the updated state, as in `return state, loss`; to have no gradients, use forward_only=True",
        )
