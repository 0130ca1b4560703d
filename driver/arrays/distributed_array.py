"""Arrays that live on the stages of a step, and how they come to the host and go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bactrian.driver.source import line_here
from bactrian.driver.xla.compile_stage import device_array
from bactrian.passes.frame.errors import BactrianError, ConfigError, ProgramError

Axes = tuple[tuple[str, int], ...]  # names and sizes of a mesh's axes
Layout = tuple[tuple[str, ...], ...]  # the axes that cut each dim
_CHUNK_BYTES = 1 << 30  # MPI counts are 32 bits


class Communicator(Protocol):
    """What ``gather`` needs of the ranks of a job."""

    rank: int
    size: int

    def broadcast(self, array: np.ndarray[Any, Any], root: int) -> None:
        """Fills ``array`` on every rank with the root's. Collective."""
        ...

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank. Collective."""
        ...


class SingleProcess:
    """The communicator of a job of one process."""

    rank = 0
    size = 1

    def broadcast(self, array: np.ndarray[Any, Any], root: int) -> None:
        """Does nothing: the root is the only rank."""

    def allgather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


class MPI:
    """A communicator over an mpi4py one."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def broadcast(self, array: np.ndarray[Any, Any], root: int) -> None:
        """Broadcasts the bytes, whatever the dtype."""
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _CHUNK_BYTES):
            self._comm.Bcast(data[start : start + _CHUNK_BYTES], root=root)

    def allgather(self, value: Any) -> list[Any]:
        """Gathers pickled values."""
        return self._comm.allgather(value)


@dataclass(frozen=True)
class Placement:
    """Where one captured argument lives.

    Attributes:
        argument: its number in the captured module.
        argnum: the step's positional argument that it belongs to.
        path: the user's pytree path.
        shape, dtype: as the user sees them; a typed key has its key dtype.
        stages: the stages that hold it, in order.
        shardings: for the stages that this rank runs, where their copies go.
        ranks: for every stage in ``stages``, the ranks that run it.
        layouts: for every stage in ``stages``, the axes of its mesh that cut each dim; empty on one device.
        meshes: for every stage in ``stages``, names and sizes of its mesh's axes.
        key_impl: of a typed key, which is carried as its uint32 words.
        num_stages: of the step that placed it; 0 if no step did.
        weak_type: JAX's weak type, so that a state that began as a Python number is not traced a second time.
    """

    argument: int
    argnum: int | None
    path: str
    shape: tuple[int, ...]
    dtype: Any
    stages: tuple[int, ...]
    shardings: Mapping[int, jax.sharding.Sharding] = field(default_factory=dict[int, jax.sharding.Sharding])
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    layouts: Mapping[int, Layout] = field(default_factory=dict[int, Layout])
    meshes: Mapping[int, Axes] = field(default_factory=dict[int, Axes])
    key_impl: Any = None
    num_stages: int = 0
    weak_type: bool = False

    @property
    def layout(self) -> str:
        """Meshes and layouts in words."""
        texts = list[str]()
        for stage in self.stages:
            axes = self.meshes.get(stage, ())
            if all(size == 1 for _, size in axes):
                texts.append("whole on one device")
                continue
            mesh = _words(axes)
            cuts = [f"dim {dim} over {' and '.join(names)}" for dim, names in enumerate(self.layouts[stage]) if names]
            texts.append(f"{', '.join(cuts) or 'whole on every device'} of {mesh}")
        return "; ".join(dict.fromkeys(texts))

    def same_place(self, other: Placement) -> bool:
        """Whether what lives at the other one lives here too, piece by piece."""
        return self.stages == other.stages and self.shardings == other.shardings

    def same_layouts(self, other: Placement) -> bool:
        """Whether the other one's stages have equal meshes here, and equal layouts."""
        return all(
            self.meshes.get(stage) == mesh and self.layouts.get(stage) == other.layouts.get(stage)
            for stage, mesh in other.meshes.items()
        )

    @cached_property
    def aval_key(self) -> tuple[tuple[int, ...], Any, bool]:
        """Shape, dtype and weak type, as calls are told apart by."""
        return self.shape, self.dtype, self.weak_type


class PlacedStep(Protocol):
    """A compiled step, as ``put`` needs it."""

    @property
    def placements(self) -> Sequence[Placement]:
        """One per captured argument that is not batch, in the order of their numbers."""
        ...

    @property
    def communicator(self) -> Communicator:
        """The ranks that the step runs on."""
        ...


class DistributedArray:
    """An array on one or several stages. A pytree leaf that can be passed to steps, gathered and saved, nothing else.

    ``pieces`` holds this rank's copies by stage (a ``jax.Array`` each; empty on ranks that hold none). Steps call
    ``donate`` on what they consume.
    """

    __slots__ = ("communicator", "donated_by", "pieces", "placement")
    __array_priority__ = 1000  # numpy asks us first, and is refused

    def __init__(
        self, placement: Placement, pieces: Mapping[int, jax.Array], communicator: Communicator | None = None
    ) -> None:
        self.placement = placement
        self.pieces: dict[int, jax.Array] = dict(pieces)
        self.communicator: Communicator = communicator or SingleProcess()
        self.donated_by: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape."""
        return self.placement.shape

    @property
    def dtype(self) -> Any:
        """The dtype; a typed key's is its key dtype."""
        return self.placement.dtype

    @property
    def weak_type(self) -> bool:
        """Whether the dtype gives way in promotions, as a Python number's does."""
        return self.placement.weak_type

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def path(self) -> str:
        """The user's pytree path."""
        return self.placement.path

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that hold it."""
        return self.placement.stages

    @property
    def sharding(self) -> str:
        """Mesh and sharding in words."""
        return self.placement.layout

    def piece(self, stage: int) -> jax.Array:
        """This rank's copy on ``stage``.

        Raises:
            ProgramError: the array was donated.
        """
        self.check_usable()
        return self.pieces[stage]

    def donate(self, where: str = "") -> dict[int, jax.Array]:
        """Hands the pieces over to a step; later use is refused and names ``where`` (by default, the user's line)."""
        self.check_usable()
        pieces, self.pieces = self.pieces, {}
        self.donated_by = where or line_here() or "an earlier call"
        return pieces

    def check_usable(self) -> None:
        """Raises a ProgramError if the array was donated or deleted."""
        where = self.donated_by
        if where is None:
            for piece in self.pieces.values():
                if piece.is_deleted():
                    where = "an earlier call"
        if where is not None:
            raise ProgramError(
                f"a donated value was used a second time: {self.path}",
                where=line_here(),
                why=f"it was donated at {where}",
                fix="use the state that the step returned, or parallelize(..., donate=False)",
            )

    def __repr__(self) -> str:
        kind = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        stages = ", ".join(map(str, self.stages))
        parts = [self.path, kind, f"stage{'s' * (len(self.stages) != 1)} {stages}", self.sharding]
        if self.donated_by is not None:
            parts.append("donated")
        return f"DistributedArray({', '.join(part for part in parts if part)})"


def of_pieces(placement: Placement, pieces: dict[int, jax.Array], communicator: Communicator) -> DistributedArray:
    """A distributed array without a copy of ``pieces``: a step makes one for every leaf of its state."""
    array = DistributedArray.__new__(DistributedArray)
    array.placement, array.pieces, array.communicator, array.donated_by = placement, pieces, communicator, None
    return array


def _refusal(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: DistributedArray, *_: Any, **__: Any) -> NoReturn:
        raise BactrianError(
            f"{operation} on {self!r}",
            where=line_here(),
            why="its values are on the devices of its stages, maybe of other ranks",
            fix="call bactrian.gather(tree) on all ranks: it returns numpy arrays",
        )

    return refuse


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "divmod")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_REFUSED = {
    "arithmetic": [f"__{side}{name}__" for name in _ARITHMETIC + _BITWISE for side in ("", "r")]
    + ["__neg__", "__pos__", "__abs__", "__invert__"],
    "comparison": [f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne")],
    "indexing": ["__getitem__", "__setitem__"],
    "iteration": ["__iter__", "__len__", "__contains__"],
    "conversion": ["__array__", "__jax_array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"]
    + ["__array_ufunc__", "__array_function__", "__round__"],
}
for _operation, _names in _REFUSED.items():
    for _name in _names:
        setattr(DistributedArray, _name, _refusal(_operation))
setattr(DistributedArray, "__hash__", object.__hash__)  # noqa: B010 -- __eq__ was refused, identity is the hash


@dataclass(frozen=True)
class Homes:
    """Where the distributed arguments of a call are.

    Attributes:
        num_stages: of the step that placed them.
        stages: the stages that hold each, by argument number.
        mesh: of every stage, if it has several devices.
        layouts: the axes that cut the dims of each, by argument number, on such a mesh.
    """

    num_stages: int
    stages: tuple[tuple[int, tuple[int, ...]], ...]
    mesh: Axes | None = None
    layouts: tuple[tuple[int, Layout], ...] = ()

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> Homes | None:
        """The homes of a call's array leaves, None if no step placed any.

        Raises:
            ConfigError: the leaves come from steps with different numbers of stages or meshes.
        """
        placed = [
            (number, leaf)
            for number, leaf in enumerate(leaves)
            if isinstance(leaf, DistributedArray) and leaf.stages and leaf.placement.num_stages
        ]
        if not placed:
            return None
        first = placed[0][1]
        for _, leaf in placed:
            if leaf.placement.num_stages != first.placement.num_stages:
                raise ConfigError(
                    f"{first.path} was placed by a step of {first.placement.num_stages} stages, "
                    f"{leaf.path} by one of {leaf.placement.num_stages}",
                    where=line_here(),
                    why="arguments that are placed already share their stages",
                    fix="give both steps the same num_stages, or pass bactrian.gather(...) of one of them",
                )
        stages = tuple((number, leaf.stages) for number, leaf in placed)
        meshes = {mesh: leaf for _, leaf in placed for mesh in leaf.placement.meshes.values()}
        if len(meshes) > 1:
            (one, leaf), (other, another) = list(meshes.items())[:2]
            raise ConfigError(
                f"{leaf.path} was placed on a mesh {_words(one)}, {another.path} on {_words(other)}",
                where=line_here(),
                why="arguments that are placed already share their mesh",
                fix="give both steps the same mesh, or pass bactrian.gather(...) of one of them",
            )
        mesh = next(iter(meshes), None)
        if mesh is None or all(size == 1 for _, size in mesh):
            return cls(first.placement.num_stages, stages)
        layouts = tuple((number, leaf.placement.layouts[leaf.stages[0]]) for number, leaf in placed)
        return cls(first.placement.num_stages, stages, mesh, layouts)


def _words(mesh: Axes) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh)


def gather(tree: Any) -> Any:
    """Host values of a tree that may hold distributed arrays: numpy arrays, and key arrays for typed keys.

    Collective: all ranks call it with the same tree, and all get the values.
    """
    return jax.tree.map(_to_host, tree)


def put(tree: Any, step: PlacedStep, *, argnum: int | None = None) -> Any:
    """Host values to where a compiled step wants them; the inverse of ``gather``.

    Args:
        tree: the whole argument of the step, every rank with the same values.
        step: the compiled step.
        argnum: which positional argument it is; found by its shapes and dtypes when not given.

    Raises:
        ProgramError: the tree fits no argument of the step, or several.
    """
    from bactrian.driver.capture.gradient_boundary import is_array

    leaves, treedef = jax.tree.flatten(tree)
    positions = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    placements = _placements_of([leaves[i] for i in positions], step, argnum)
    for i, placement in zip(positions, placements, strict=True):
        if not isinstance(leaves[i], DistributedArray):
            leaves[i] = _to_devices(leaves[i], placement, step.communicator)
    return jax.tree.unflatten(treedef, leaves)


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, DistributedArray):
        leaf.check_usable()
        data = physical_values(leaf)
        if leaf.placement.key_impl is None:
            return data
        return jax.random.wrap_key_data(jnp.asarray(data), impl=leaf.placement.key_impl)
    if isinstance(leaf, jax.Array) and not _is_key(leaf.dtype):
        return np.asarray(leaf)
    return leaf


def physical_values(array: DistributedArray) -> np.ndarray[Any, Any]:
    """The values of the first stage's copy, on every rank."""
    comm, stage = array.communicator, array.stages[0]
    ranks = array.placement.ranks.get(stage, (0,))
    piece = array.pieces.get(stage)
    if comm.size == 1 or (len(ranks) == comm.size and piece is not None and piece.is_fully_replicated):
        assert piece is not None
        return np.asarray(piece)
    physical = _physical_aval(array.placement)
    values = np.empty(physical.shape, physical.dtype)
    if len(ranks) == 1:
        if comm.rank == ranks[0]:
            assert piece is not None
            values = np.array(piece, order="C")
        comm.broadcast(values, ranks[0])
        return values
    return _gathered(values, piece, comm)


def whole_value(array: jax.Array, communicator: Communicator) -> np.ndarray[Any, Any]:
    """The values of an array on a mesh of several ranks, on each of them. Collective."""
    return _gathered(np.empty(array.shape, array.dtype), array, communicator)


def _gathered(values: np.ndarray[Any, Any], piece: jax.Array | None, comm: Communicator) -> np.ndarray[Any, Any]:
    """Fill ``values`` with what the mesh's ranks hold: each sends the shards that it is the first to hold."""
    held = piece.addressable_shards if piece is not None else []
    shards = [(shard.index, np.asarray(shard.data)) for shard in held if shard.replica_id == 0]
    for part in comm.allgather(shards):
        for index, data in part:
            values[index] = data
    return values


def _physical_aval(placement: Placement) -> jax.ShapeDtypeStruct:
    logical = jax.ShapeDtypeStruct(placement.shape, placement.dtype)
    return jax.eval_shape(jax.random.key_data, logical) if placement.key_impl is not None else logical


def _placements_of(leaves: Sequence[Any], step: PlacedStep, argnum: int | None) -> list[Placement]:
    by_argnum: dict[int | None, list[Placement]] = {}
    for placement in sorted(step.placements, key=lambda p: p.argument):
        by_argnum.setdefault(placement.argnum, []).append(placement)
    wanted = [_shape_dtype(leaf) for leaf in leaves]
    fits = [n for n, ps in by_argnum.items() if [(p.shape, p.dtype) for p in ps] == wanted and argnum in (None, n)]
    if len(fits) != 1:
        raise ProgramError(
            f"the tree of {len(leaves)} arrays fits {len(fits)} arguments of the step",
            where=line_here(),
            why="; ".join(f"argument {n} has {len(ps)} arrays, first {ps[0].path}" for n, ps in by_argnum.items()),
            fix="give the whole argument" + ("" if argnum is not None else ", and argnum= if several look alike"),
        )
    return by_argnum[fits[0]]


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    value = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    dtype = value.dtype if _is_key(value.dtype) else jax.dtypes.canonicalize_dtype(value.dtype)
    return tuple(value.shape), dtype


def _to_devices(leaf: Any, placement: Placement, communicator: Communicator) -> DistributedArray:
    value = np.asarray(jax.random.key_data(leaf)) if _is_key(getattr(leaf, "dtype", None)) else np.asarray(leaf)
    value = value.astype(_physical_aval(placement).dtype, copy=False)
    pieces = {stage: device_array(value, sharding, True) for stage, sharding in placement.shardings.items()}
    return DistributedArray(placement, pieces, communicator)


def _is_key(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
