"""The ``bactrian.*`` attributes and custom calls of the IR: their names, and how they are read and written.

``docs/ir.md`` says what each of them means and which pass writes it. No other file spells one of these names.
"""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError

# Custom calls.
GRADIENT_BOUNDARY = "bactrian.gradient_boundary"
STAGE_BOUNDARY = "bactrian.stage_boundary"
MICROBATCH_INDEX = "bactrian.microbatch_index"  # also on the argument of a stage function that gets the index

# Of the module.
NUM_MICROBATCHES = "bactrian.num_microbatches"
NUM_LAYERS = "bactrian.num_layers"
NUM_STAGES = "bactrian.num_stages"
FIRST_LAYERS = "bactrian.first_layers"  # of every stage
FIRST_DEVICES = "bactrian.first_devices"  # of every stage, on the cluster's line
SCHEDULE = "bactrian.schedule"
REMAT = "bactrian.remat"
LOOPED_MICROBATCHES = "bactrian.looped_microbatches"
ORDER = "bactrian.order"
SHARDING_ESTIMATES = "bactrian.sharding"
SENT_BYTES = "bactrian.sent_bytes"
SOLVE = "bactrian.solve"

# Of arguments and results of `@main` and of stage functions.
ROLE = "bactrian.role"
UPDATES = "bactrian.updates"
PINNED_STAGES = "bactrian.pinned_stages"
STAGE_SHARDINGS = "bactrian.stage_shardings"
ARGUMENT = "bactrian.argument"
RESULT = "bactrian.result"
ROWS = "bactrian.rows"  # of the argument or result, beside `ARGUMENT` or `RESULT`: first and behind the last
ACCUMULATOR = "bactrian.accumulator"
ALIAS = "tf.aliasing_output"  # XLA's: the result that takes over the argument's buffer

# Of ops.
PHASE = "bactrian.phase"
LAYER = "bactrian.layer"
STAGE = "bactrian.stage"
ROUND = "bactrian.round"
ACCUMULATE = "bactrian.accumulate"
COUNTER = "bactrian.counter"  # the results of `@main` that the op computes for its own stage
PARTIAL = "bactrian.partial"  # the op ends one stage's part of a regrouped reduction
PLACEMENT = (PHASE, STAGE, LAYER)

# Roles.
ROLES = ("state", "batch", "constant")

# Phases.
PREPARE, INITIALIZE = "prepare", "initialize"  # once per step, before what reads them
FORWARD, BACKWARD = "forward", "backward"  # once per microbatch
UPDATE = "update"  # once per step, behind the gradient boundary
ONCE_PER_STEP = (PREPARE, INITIALIZE, UPDATE)
PHASES = (*ONCE_PER_STEP, FORWARD, BACKWARD)
FUSED = "forward_backward"  # of a call of a stage function only

AttributeDict = dict[str, ir.Attribute]


def string_attribute(op: ir.Operation, name: str) -> str | None:
    """A string attribute's value, or None where it is absent."""
    attributes = op.attributes
    return ir.StringAttr(attributes[name]).value if name in attributes else None


def integer_attribute(op: ir.Operation, name: str) -> int | None:
    """An integer attribute's value, or None where it is absent."""
    attributes = op.attributes
    return ir.IntegerAttr(attributes[name]).value if name in attributes else None


def required_integer(op: ir.Operation, name: str, fix: str) -> int:
    """An integer attribute that must have been written: ``fix`` says how.

    Raises:
        PassError: if it is absent.
    """
    value = integer_attribute(op, name)
    if value is None:
        raise error_at(PassError, op, f"{name} is missing on {op.name}", fix=fix)
    return value


def integer(value: int) -> ir.Attribute:
    """``value`` as an ``i64`` attribute (in the current context)."""
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


def read_num_stages(module: ir.Module) -> int:
    """``bactrian.num_stages`` of a module (``assign-stages``)."""
    return required_integer(module.operation, NUM_STAGES, "run assign-stages first")


def read_num_microbatches(module: ir.Module) -> int:
    """``bactrian.num_microbatches`` of a module (capture)."""
    fix = f"start from `step.trace(*args).text`, or set the module attribute {NUM_MICROBATCHES}"
    return required_integer(module.operation, NUM_MICROBATCHES, fix)


def read_schedule(module: ir.Module) -> str | None:
    """``bactrian.schedule`` of a module, or None where it is absent."""
    return string_attribute(module.operation, SCHEDULE)


def read_first_layers(module: ir.Module) -> tuple[int, ...] | None:
    """``bactrian.first_layers`` of a module, or None where it is absent."""
    if FIRST_LAYERS not in module.operation.attributes:
        return None
    return tuple(ir.DenseI64ArrayAttr(module.operation.attributes[FIRST_LAYERS]))


def read_first_devices(module: ir.Module) -> tuple[int, ...] | None:
    """``bactrian.first_devices`` of a module, or None where it is absent."""
    if FIRST_DEVICES not in module.operation.attributes:
        return None
    return tuple(ir.DenseI64ArrayAttr(module.operation.attributes[FIRST_DEVICES]))


def read_remat(module: ir.Module) -> tuple[str, ...]:
    """``bactrian.remat`` of a module: a word for each layer; no words where it is absent."""
    attributes = module.operation.attributes
    if REMAT not in attributes:
        return ()
    return tuple(ir.StringAttr(word).value for word in ir.ArrayAttr(attributes[REMAT]))


def phase_of(op: ir.Operation) -> str | None:
    """``bactrian.phase`` of an op."""
    return string_attribute(op, PHASE)


def layer_of(op: ir.Operation) -> int | None:
    """``bactrian.layer`` of an op."""
    return integer_attribute(op, LAYER)


def stage_of(op: ir.Operation) -> int | None:
    """``bactrian.stage`` of an op."""
    return integer_attribute(op, STAGE)


def required_stage(op: ir.Operation) -> int:
    """``bactrian.stage`` of an op that must have one."""
    return required_integer(op, STAGE, "run assign-stages first")


def round_of(op: ir.Operation) -> int:
    """``bactrian.round`` of an op or a call: 0 where it is absent."""
    return integer_attribute(op, ROUND) or 0


def required_phase(op: ir.Operation) -> str:
    """``bactrian.phase`` of an op that must have one.

    Raises:
        PassError: if it is absent.
    """
    phase = phase_of(op)
    if phase is None:
        raise error_at(PassError, op, f"{PHASE} is missing on {op.name}", fix="run infer-phases first")
    return phase


def set_phase(op: ir.Operation, phase: str) -> None:
    """Write ``bactrian.phase``."""
    op.attributes[PHASE] = ir.StringAttr.get(phase)


def set_stage(op: ir.Operation, stage: int) -> None:
    """Put an op on a stage. One that comes from another stage loses its layer, which is a part of that one."""
    if LAYER in op.attributes and stage_of(op) not in (None, stage):
        del op.attributes[LAYER]
    op.attributes[STAGE] = integer(stage)


def phase_and_stage(phase: str, stage: int) -> AttributeDict:
    """The attributes of a new op of a phase and a stage."""
    return {PHASE: ir.StringAttr.get(phase), STAGE: integer(stage)}


def placement(op: ir.Operation) -> AttributeDict:
    """The attributes of a new op beside another one, which must have a phase and a stage: these, and its layer if it has one."""
    layer = {LAYER: op.attributes[LAYER]} if LAYER in op.attributes else {}
    return {**phase_and_stage(required_phase(op), required_stage(op)), **layer}


def with_phase(attributes: AttributeDict, phase: str) -> AttributeDict:
    """The attributes of a new op of another phase."""
    return {**attributes, PHASE: ir.StringAttr.get(phase)}


def argument_attributes(function: ir.Operation) -> list[AttributeDict]:
    """A copy of the attributes of each argument of a function."""
    return _entries(function, "arg_attrs", len(_type_of(function).inputs))


def result_attributes(function: ir.Operation) -> list[AttributeDict]:
    """A copy of the attributes of each result of a function."""
    return _entries(function, "res_attrs", len(_type_of(function).results))


def argument_roles(main: ir.Operation) -> list[str]:
    """``bactrian.role`` of each argument of ``@main``: ``state``, ``batch`` or ``constant``."""
    return [ir.StringAttr(entry[ROLE]).value for entry in argument_attributes(main)]


def argument_pinned_stages(main: ir.Operation) -> dict[int, tuple[int, ...]]:
    """``bactrian.pinned_stages``: the stages that hold an argument already, in order, by argument number."""
    pinned: dict[int, tuple[int, ...]] = {}
    for argument, entry in enumerate(argument_attributes(main)):
        if PINNED_STAGES in entry:
            pinned[argument] = tuple(
                sorted(ir.IntegerAttr(stage).value for stage in ir.ArrayAttr(entry[PINNED_STAGES]))
            )
    return {argument: stages for argument, stages in pinned.items() if stages}


def result_updates(main: ir.Operation) -> list[int | None]:
    """For each result of ``@main``, the argument whose next value it is (``bactrian.updates``)."""
    return [ir.IntegerAttr(entry[UPDATES]).value if UPDATES in entry else None for entry in result_attributes(main)]


def _type_of(function: ir.Operation) -> ir.FunctionType:
    return ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)


def _entries(function: ir.Operation, name: str, count: int) -> list[AttributeDict]:
    if name not in function.attributes:
        return [{} for _ in range(count)]
    return [{item.name: item.attr for item in ir.DictAttr(entry)} for entry in ir.ArrayAttr(function.attributes[name])]
