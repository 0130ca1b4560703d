"""What is predicted of the time of a step, as plain data. No MLIR, no jax."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.plan.json_fields import add_record


@dataclass(frozen=True)
class StageTiming:
    """Seconds of a stage. Bubble and exposed communication, with what it is busy, are the whole step.

    Attributes:
        forward_seconds, backward_seconds: of one microbatch.
        update_seconds: once per step, after all microbatches.
        prepare_seconds: once per step, before the first.
        calls_seconds: of a step, what its calls take beside their work; as much of each.
        bubble_seconds: of a step, in which it waits for other stages, or is done.
        exposed_seconds: of a step, in which it waits for a message that is under way.
        communication_seconds: of a step, for which messages to it are under way; those beyond ``exposed_seconds`` are
            hidden.
    """

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    prepare_seconds: float = 0.0
    calls_seconds: float = 0.0
    bubble_seconds: float | None = None
    exposed_seconds: float | None = None
    communication_seconds: float | None = None

    @property
    def once_seconds(self) -> float:
        """What is done once per step, and what calls take beside their work."""
        return self.prepare_seconds + self.update_seconds + self.calls_seconds

    def busy_seconds(self, num_microbatches: int) -> float:
        """Of a step of so many microbatches."""
        return num_microbatches * (self.forward_seconds + self.backward_seconds) + self.once_seconds


@dataclass(frozen=True)
class TransferTiming:
    """One value that goes from one stage to another.

    Attributes:
        source, target: the stages.
        nbytes: of the whole value.
        link_seconds: it keeps its links for so long.
        latency_seconds: after that, until all devices of the target have what they need of it.
        links: that it needs to itself.
    """

    source: int
    target: int
    nbytes: int
    link_seconds: float
    latency_seconds: float
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageMeasurement:
    """What is known of a stage whose functions were measured, beside their seconds.

    Attributes:
        peak_bytes: of each device, as XLA has compiled the functions.
        model_seconds: that the cost model has for it in a step.
    """

    peak_bytes: int
    model_seconds: float


add_record(StageMeasurement, "a list of measurements")
add_record(StageTiming, "a list of times of stages")
add_record(TransferTiming, "a list of transfers")
