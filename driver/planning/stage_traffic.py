"""What a stage keeps in memory and sends to other stages, read off the staged program."""

from __future__ import annotations

from collections.abc import Callable

from bactrian.runtime.staged_program import StagedProgram


class StageTraffic:
    """State, activations and messages of one stage, in bytes of the whole stage."""

    def __init__(self, program: StagedProgram, stage: int) -> None:
        self._program, self._stage = program, stage
        self._phase_of = {value: call.phase for call in program.calls for value in call.outputs}
        trains = any(call.phase in ("backward", "forward_backward") for call in program.calls)
        self._roles = ("state",) if trains else ("state", "constant")
        self._calls = [call for call in program.calls if call.stage == stage]

    def state_values(self, phase_matches: Callable[[str], bool]) -> list[int]:
        """State pieces that functions of matching phases read; read-only arguments, too, if nothing is trained."""
        state = {piece.value for piece in self._program.arguments if piece.role in self._roles}
        read = {value for call in self._calls if phase_matches(call.phase) for value in call.inputs}
        here = {value for value in state if self._program.values[value].stage == self._stage}
        return sorted(read & here)

    def _prepared(self) -> set[int]:
        return {value for call in self._calls if call.phase == "prepare" for value in call.outputs}

    def prepared_bytes(self) -> int:
        """Bytes of what the stage makes once per step and holds for all microbatches."""
        return sum(self._program.values[value].nbytes for value in self._prepared())

    def activation_bytes(self) -> int:
        """Bytes that a microbatch leaves between its forward and its backward on this stage."""
        there = {piece.value for piece in self._program.arguments} | self._prepared()
        carried = {call.inputs[position] for call in self._calls for position, _ in call.carries}
        kept: set[int] = set()
        for call in self._calls:
            if call.phase == "backward":
                kept |= {v for v in call.inputs if v >= 0 and v not in there and v not in carried}
        made_or_read: set[int] = set()
        for call in self._calls:
            if call.phase == "forward":
                made_or_read |= {*call.inputs, *call.outputs}
        return sum(self._program.values[value].nbytes for value in kept & made_or_read)

    def sent_bytes(self, phases: tuple[str, ...] | None) -> int:
        """Bytes sent by functions of the given phases per microbatch, or (None) once per step for the update."""
        total = 0
        for transfer in self._program.transfers:
            source, target = self._program.values[transfer.source], self._program.values[transfer.target]
            if source.stage != self._stage:
                continue
            once = not target.per_microbatch
            if (phases is None and once) or (
                phases is not None and not once and self._phase_of.get(transfer.source) in phases
            ):
                total += source.nbytes
        return total
