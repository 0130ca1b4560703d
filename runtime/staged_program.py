"""The staged program as plain data: what the runtime knows of the compiled step. No MLIR, no jax."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.machine.spec import UNSHARDED, MeshAxes, Spec, num_devices


@dataclass(frozen=True)
class Value:
    """One tensor on one stage, in the data flow of one microbatch.

    ``per_microbatch`` is true where each microbatch has its own (batch pieces, forward and backward results);
    false for state, read-only pieces and results of ``prepare``, ``initialize`` and ``update``.
    ``spec`` says how the stage's mesh shards it.
    """

    id: int
    stage: int
    shape: tuple[int, ...]
    dtype: str  # numpy name: "float32", "bfloat16", "int32", "bool", ...
    per_microbatch: bool
    spec: Spec = UNSHARDED

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size * (2 if self.dtype == "bfloat16" else _ITEM_BYTES.get(self.dtype) or _item_bytes(self.dtype))


_ITEM_BYTES = {"bool": 1, "float32": 4, "int32": 4, "uint32": 4, "float64": 8, "int64": 8, "float16": 2}


def _item_bytes(dtype: str) -> int:
    import ml_dtypes  # comes with jax; knows float8_* and int4
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


ONCE_PER_STEP = ("prepare", "initialize", "update")  # phases of calls


@dataclass(frozen=True)
class Call:
    """One stage function at its place in the data flow.

    Phases: ``prepare`` and ``initialize`` (once, first), ``forward``, ``backward``, ``forward_backward`` (once per microbatch),
    ``update`` (once, last; ``round`` 0, 1, … in order).
    ``carries`` pairs (input position, output position): from the second microbatch on, that input is that output of
    the microbatch before (an accumulator). ``donated`` are the input positions whose buffers the call consumes.
    ``index_input`` is the input position that receives the microbatch's number as an int32 scalar (its entry in
    ``inputs`` is -1), if any.
    """

    function: str  # symbol, e.g. "stage0.forward"
    stage: int
    phase: str
    round: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...] = ()
    carries: tuple[tuple[int, int], ...] = ()
    index_input: int | None = None

    @property
    def runs_once(self) -> bool:
        """Whether it is made once per step, and not for each microbatch."""
        return self.phase in ONCE_PER_STEP


@dataclass(frozen=True)
class Transfer:
    """Value ``source`` on one stage becomes value ``target`` on another."""

    source: int
    target: int


@dataclass(frozen=True)
class ArgumentPiece:
    """Captured argument ``argument`` as it is read by one stage: all of it, or only the ``rows`` from the first to
    before the second."""

    argument: int
    role: str  # "state", "batch", "constant"
    value: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ResultPiece:
    """Captured result ``result`` as one stage keeps it, or only some ``rows`` of it; ``updates`` is the argument that it
    is the next value of."""

    result: int
    value: int
    updates: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class StagedProgram:
    """The data flow of one microbatch plus initialization and update, and each stage's order of work.

    ``calls`` and ``transfers`` are in a valid program order. ``order[s]`` holds tokens ``"F<m>"``, ``"B<m>"`` and
    ``"FB<m>"``: the forward, backward or fused call of stage ``s`` for microbatch ``m``.
    A value of a microbatch that an update (or a result) reads is the last microbatch's.
    ``meshes`` holds names and sizes of the axes of each stage's mesh; empty stands for one device each.
    """

    num_stages: int
    num_microbatches: int
    schedule: str
    values: tuple[Value, ...]  # indexed by id
    calls: tuple[Call, ...]
    transfers: tuple[Transfer, ...]
    arguments: tuple[ArgumentPiece, ...]
    results: tuple[ResultPiece, ...]
    order: tuple[tuple[str, ...], ...]
    meshes: tuple[MeshAxes, ...] = ()

    def mesh(self, stage: int) -> MeshAxes:
        """Names and sizes of the axes of a stage's mesh, the major one first."""
        return self.meshes[stage] if self.meshes else (("data", 1),)

    def spec_on(self, value: int, stage: int) -> Spec:
        """How a stage's mesh shards a value there: as the value says on its own stage. A result that another stage gets is
        replicated, as is a microbatch's number (value -1)."""
        if value < 0 or self.values[value].stage != stage:
            return UNSHARDED
        return self.values[value].spec

    def num_devices(self, stage: int) -> int:
        """Devices of a stage's mesh."""
        return num_devices(self.mesh(stage))
