"""``bactrian.parallelize`` and the steps between a train step and its run: trace, plan, compile, call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from jax.core import Tracer

from bactrian.driver.arrays.host_values import gather
from bactrian.driver.arrays.placed_arguments import PlacedArguments
from bactrian.driver.arrays.placement import ArgumentPlacement
from bactrian.driver.capture.argument_shardings import refuse_explicit_axes, requested_shardings
from bactrian.driver.capture.call_signature import FlatCall, Parameters, collective_call, flatten_call, named_leaves
from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.capture.lower_step import capture
from bactrian.driver.capture.reference_step import reference, reference_function
from bactrian.driver.gc_pause import paused_collection
from bactrian.driver.planning.options import Options
from bactrian.driver.run.compiled_step import Compiled
from bactrian.driver.source import line_here
from bactrian.driver.traced_step import Traced
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.visible import visible
from bactrian.passes.machine.spec import num_devices
from bactrian.passes.plan.schema import Plan
from bactrian.runtime import lockstep, rank_lifecycle
from bactrian.runtime.control import Control
from bactrian.runtime.lockstep import CollectiveCall

_log = logging.getLogger("bactrian")

_INSTEAD = {  # of what jitted functions have
    "lower": "trace(*args), whose text is the StableHLO; trace(*args).plan().compile() compiles it",
    "eval_shape": "jax.eval_shape(step, *args)",
    "clear_cache": "with_options(), which makes a step that has compiled nothing yet",
}


@overload
def parallelize(
    fun: Callable[..., Any],
    *,
    num_stages: int | Literal["auto"] | None = None,
    num_microbatches: int | Literal["auto"] | None = None,
    schedule: str | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    state: Mapping[int, int | None] | None = None,
    cluster: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    donate: bool = True,
    forward_only: bool = False,
    out_reduction: Any = "concat",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    axis_name: str | None = None,
    mesh: str | Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    boundaries: str | Sequence[int] | None = None,
    strategy: str = "auto",
    remat: str | Sequence[str] | None = None,
    check_inputs: bool = True,
    profile: bool | str | Path = False,
) -> Parallelized: ...
@overload
def parallelize(
    fun: None = None,
    *,
    num_stages: int | Literal["auto"] | None = None,
    num_microbatches: int | Literal["auto"] | None = None,
    schedule: str | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    state: Mapping[int, int | None] | None = None,
    cluster: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    donate: bool = True,
    forward_only: bool = False,
    out_reduction: Any = "concat",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    axis_name: str | None = None,
    mesh: str | Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    boundaries: str | Sequence[int] | None = None,
    strategy: str = "auto",
    remat: str | Sequence[str] | None = None,
    check_inputs: bool = True,
    profile: bool | str | Path = False,
) -> Callable[[Callable[..., Any]], Parallelized]: ...
def parallelize(
    fun: Callable[..., Any] | None = None,
    *,
    num_stages: int | Literal["auto"] | None = None,
    num_microbatches: int | Literal["auto"] | None = None,
    schedule: str | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    state: Mapping[int, int | None] | None = None,
    cluster: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    donate: bool = True,
    forward_only: bool = False,
    out_reduction: Any = "concat",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    axis_name: str | None = None,
    mesh: str | Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    boundaries: str | Sequence[int] | None = None,
    strategy: str = "auto",
    remat: str | Sequence[str] | None = None,
    check_inputs: bool = True,
    profile: bool | str | Path = False,
) -> Parallelized | Callable[[Callable[..., Any]], Parallelized]:
    """Run a train step as a pipeline over the ranks of this job.

    A decorator, with or without arguments. The step takes state and batch and returns the next state and whatever else;
    its gradients come from ``bactrian.value_and_grad`` or ``bactrian.grad``.

    Args:
        fun: the train step.
        num_stages: pipeline stages; by default one per rank, or one in a single process.
        num_microbatches: the batch is split into so many along dim 0; 1 by default.
        schedule: ``1f1b``, the default, ``eager-1f1b`` or ``gpipe``.
        batch_argnums: positional arguments whose leaves have the batch as dim 0; argument 1 by default.
        state: the result that is an argument's next value, by index; others are matched by tree, shapes and dtypes.
        cluster: the TOML file of the machines (`bactrian.passes.machine.cluster_file.read_cluster`); or this host's cores.
            With a file and no ``mesh``, or where anything is ``"auto"``, all that is not given is found.
        plan: a `Plan`, or the folder or file of a saved one; its decisions are applied instead of found.
        donate: let the step reuse the buffers of the state that it is given.
        forward_only: ``fun`` takes no gradient and is run as a forward pipeline.
        out_reduction: of results of ``forward_only``: ``concat``, ``mean``, ``sum``, ``last``, or a prefix tree of these.
        static_argnums, static_argnames: arguments that the step sees as Python values, as for ``jax.jit``.
        axis_name: the axis of a step that was written for ``jax.pmap``: its one device then has the whole batch.
        mesh: the axes of a stage's devices, over which values are sharded, as in ``{"data": 2, "model": 4}`` or
            ``"data=2,model=4"``; one device by default. A list, or a text as in ``"data=2;data=4"``: of each stage.
        boundaries: the first layer of each stage, as in ``(0, 3, 5)``, of those that plans list; the rest is found.
        strategy: ``auto``, or a baseline: ``data``, ``zero1``, ``zero2``, ``zero3``, ``megatron``; it leaves some open.
        remat: what layers compute again in their backward phase: ``none``; ``products``, all but products without batch
            dims; or ``all``, but for what comes into them. One word, or one for each layer, of which so many are made.
        check_inputs: compare batch and state between ranks; False for a loader that gives each rank its own part only.
        profile: compile and time stages on this host's devices, and plan with that. True, or a folder to keep it in.

    Returns:
        A `Parallelized`, to be called like ``fun``.

    Raises:
        ConfigError: an option is wrong.
    """
    options = Options.of(**{name: value for name, value in locals().items() if name != "fun"})
    return Parallelized(fun, options) if fun is not None else lambda function: Parallelized(function, options)


class Parallelized:
    """A train step that runs as a pipeline. Call it like the step itself.

    The first call with new shapes traces, plans and compiles; `trace` does the same one step at a time. Inside of a
    function that JAX traces (`jax.eval_shape`, `jax.make_jaxpr`) the step is that of `reference`, on one device.
    """

    __name__: str

    def __init__(self, fun: Callable[..., Any], options: Options) -> None:
        rank_lifecycle.join_job()
        functools.update_wrapper(self, fun)
        self.__name__ = getattr(fun, "__name__", type(fun).__name__)
        self.fun, self.options = fun, options
        self._parameters = Parameters.of(fun, options.static_argnums, options.static_argnames)
        self._compiled: dict[
            Any, dict[PlacedArguments | None, Compiled]
        ] = {}  # by signature, then by where state came from
        self._captured: dict[Any, Captured] = {}
        self._last: Compiled | None = None
        self._told_of_jax = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        last = self._last
        if last is not None and not kwargs and (leaves := last.leaves_if_placed(args)) is not None:
            lockstep.note(last.step_call)
            return last.captured.returned(last.call_placed(leaves), args, kwargs)
        call = flatten_call(self._parameters, args, kwargs)
        if any(isinstance(leaf, Tracer) for leaf in call.leaves):
            return self._in_jax(args, kwargs)
        if last is None or call.signature != last.captured.call_signature or not last.has_all(call.leaves):
            last = self._last = self._compiled_for(call, args, kwargs)
        lockstep.note(last.step_call)
        return last.captured.returned(last.call_leaves(call.leaves), args, kwargs)

    def _in_jax(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a transformation of JAX (``eval_shape``, ``make_jaxpr``, ``jit``) sees: the reference."""
        if not self._told_of_jax:
            self._told_of_jax = True
            _log.warning("%s is traced by JAX: there it is a function of one device, and has no stages", self.__name__)
        return reference_function(self._capture(args, kwargs))(*args, **kwargs)

    def _compiled_for(self, call: FlatCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        """The step compiled for such arguments at such places; one that has all it needs there serves as well."""
        signature, leaves = call.signature, call.leaves
        placed = PlacedArguments.of(leaves)
        known = self._compiled.get(signature, {})
        if placed not in known:
            fitting = next((compiled for compiled in known.values() if compiled.has_all(leaves)), None)
            if fitting is None:
                if known:
                    _log.warning("%s is planned again: its state is where another step placed it", self.__name__)
                elif self._compiled:
                    _log.warning("%s is traced again for new shapes, dtypes or static arguments", self.__name__)
                lockstep.note(self._compilation(call))
                fitting = self.trace(*args, **kwargs).plan_with_all().compile_as_noted()
            self._compiled[signature] = known | {placed: fitting}
        return self._compiled[signature][placed]

    def _compilation(self, call: FlatCall) -> CollectiveCall:
        """How ranks compare the compilation for such arguments, before any of them traces for others."""
        leaves = named_leaves(call, self._parameters)
        batch = [f"{leaf.path} {leaf.aval}" for leaf in leaves if leaf.argnum in self.options.batch_argnums]
        return collective_call("compile", self.__name__, call.signature, batch)

    def with_options(self, **changes: Any) -> Parallelized:
        """The same step with some options of ``parallelize`` changed, as in ``num_microbatches=8``; None is the default.

        Raises:
            ConfigError: an option is not known, or is wrong.
        """
        return Parallelized(self.fun, self.options.changed(**changes))

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Trace the step at microbatch size; arguments may be abstract (``jax.ShapeDtypeStruct``). Needs no device.

        Arguments that another step has placed stay on their stages: the plan will put there what reads them.
        """
        placed = PlacedArguments.of(flatten_call(self._parameters, args, kwargs).leaves)
        retrace = functools.partial(self._capture, args, kwargs)
        return Traced(self._capture(args, kwargs), self.options, placed, retrace)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The same step as plain JAX on one device, one microbatch after another: the oracle.

        Takes host or distributed arguments (then all ranks must call it), donates nothing, returns local arrays.
        """
        args, kwargs = gather((args, kwargs))
        return reference(self._capture(args, kwargs), args, kwargs)

    @property
    def compiled(self) -> Compiled:
        """The compiled step of the last call.

        Raises:
            ConfigError: it was not called yet.
        """
        if self._last is None:
            raise ConfigError(
                f"{self.__name__} was not called yet",
                where=line_here(),
                why="a step is planned and compiled for its first arguments; these may be on the host",
                fix="call it, or use trace(...).plan().compile()",
            )
        return self._last

    @property
    def placements(self) -> Sequence[ArgumentPlacement] | None:
        """Where the last call keeps each argument that is not batch, for ``bactrian.put``; None before the first."""
        return None if self._last is None else self._last.placements

    @property
    def control(self) -> Control:
        """The ranks that the compiled step of the last call runs on, for ``bactrian.put``."""
        return self.compiled.control

    if not TYPE_CHECKING:  # type checkers would take every name for an attribute

        def __getattr__(self, name: str) -> NoReturn:
            use = f": use {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise AttributeError(f"a step of bactrian.parallelize has no attribute {name!r}{use}")

    def __repr__(self) -> str:
        o = self.options
        if o.leaves_open(o.cluster):
            return f"<bactrian step {self.__name__}: a pipeline is found for {o.cluster}>"
        stages = "one stage per rank" if o.num_stages is None else f"{o.num_stages} stages"
        return f"<bactrian step {self.__name__}: {stages}, {o.num_microbatches} microbatches, {o.schedule}>"

    def _capture(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        num_microbatches: int | None = None,
        schedule: str | None = None,
    ) -> Captured:
        """The step as it was last captured, else as the options say; or for a number of microbatches and a schedule."""
        o = self.options
        if any(num_devices(mesh) > 1 for mesh in o.meshes):
            refuse_explicit_axes()
        call = flatten_call(self._parameters, args, kwargs)
        signature = call.signature, requested_shardings(call.leaves)
        known, wanted = self._captured.get(signature), (num_microbatches, schedule)
        if known is None or (wanted != (None, None) and wanted != (known.num_microbatches, known.schedule)):
            with paused_collection():
                captured = capture(
                    self.fun,
                    args,
                    kwargs,
                    batch_argnums=o.batch_argnums if "batch_argnums" in o.given else None,
                    num_microbatches=num_microbatches or o.num_microbatches,
                    schedule=schedule or o.schedule,
                    state=o.state,
                    forward_only=o.forward_only,
                    out_reduction=o.out_reduction,
                    parameters=self._parameters,
                    axis_name=o.axis_name,
                )
            for remark in captured.remarks:
                _log.warning("%s", visible(remark))
            self._captured[signature] = captured
        return self._captured[signature]
