"""What is decided and predicted about the shardings of one stage, as plain data. No MLIR, no jax."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.plan.json_fields import add_record


@dataclass(frozen=True)
class ShardingFigures:
    """What a step is predicted to take with some shardings.

    Attributes:
        name: ``chosen``, or the known plan that it is.
        seconds: of a step; None where it does not fit into memory.
        communication_seconds: the part of it in which devices exchange values.
        memory_bytes: the peak of a device.
    """

    name: str
    seconds: float | None = None
    communication_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ShardingPlan:
    """The shardings of a stage on its mesh.

    Attributes:
        strategy: ``auto``, or the known plan that was asked for.
        seconds: predicted, of a step.
        bound_seconds: no shardings take less, in the cost model, with what was given.
        given: how many arguments had their sharding already: from a plan, from another step, or from the user.
        communication_seconds: the part of ``seconds`` in which devices exchange values.
        sent_bytes: what each device sends in a step, by kind of collective.
        memory_bytes: the peak of a device, by class: the values that the choice is made of.
        limit_bytes: of a device, that the choice had to keep.
        peak_bytes: of a device, as XLA runs the stage's functions: with copies, temporaries and
            results before they are cut.
        temporary_bytes: the part of it that only the function needs that runs then.
        shardings: of every argument of the step, by its path, as `Spec` writes them.
        compared: known plans on the same mesh.
    """

    strategy: str = "auto"
    seconds: float = 0.0
    bound_seconds: float = 0.0
    given: int = 0
    communication_seconds: float = 0.0
    sent_bytes: tuple[tuple[str, int], ...] = ()
    memory_bytes: tuple[tuple[str, int], ...] = ()
    limit_bytes: int | None = None
    peak_bytes: int | None = None
    temporary_bytes: int | None = None
    shardings: tuple[tuple[str, str], ...] = ()
    compared: tuple[ShardingFigures, ...] = ()

    @property
    def is_optimal(self) -> bool:
        """Whether it is proved that no shardings take less, in the cost model, beside what was given."""
        return self.bound_seconds >= self.seconds * (1 - 1e-9)


add_record(ShardingFigures, "a list of figures of known plans")
add_record(ShardingPlan, "a list of sharding plans")
