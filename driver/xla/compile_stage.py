"""Compiling stage functions with XLA: the one file that touches JAX's private compile path.

Seen to work unchanged on jax 0.10.2 and 0.11.2. Compiled functions go to JAX's compilation cache when it is set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler  # pyright: ignore
from jax._src.core import ShapedArray  # pyright: ignore
from jax._src.interpreters import mlir as jax_mlir  # pyright: ignore
from jax._src.interpreters import pxla  # pyright: ignore
from jax._src.lib import xla_client  # pyright: ignore
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.driver.planning.extract import numpy_dtype
from bactrian.driver.xla.local_program import prepare_for_xla
from bactrian.passes.ir.attributes import ALIAS, argument_attributes
from bactrian.passes.ir.meshes import SHARDING, mesh_attribute, mesh_axes, spec_of
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import MeshAxes, Spec, num_devices
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.runtime.transports.interface import device_array as plain_device_array

_DROPS_BARRIERS = "cse_barrier_expander"
"""XLA's pass that takes optimization barriers out. For CPUs it runs before equal ops are merged, and before the order of
work is chosen: what a barrier keeps from being computed early, or once, would be."""

_STAGE_MESH = re.compile(r"@stage\d+\b")

JaxDevice = Any  # jax.Device, which its own stubs declare as a variable
CompiledFunction = Callable[[Sequence[jax.Array]], list[jax.Array]]


def function_texts(staged: ir.Module) -> dict[str, str]:
    """Each stage function as a module of its own (text with ``@main``), by its symbol."""
    with staged.context:
        texts: dict[str, str] = {}
        meshes = mesh_axes(staged)
        for view in staged.body.operations:
            op = view.operation
            if op.name != "func.func":
                continue
            symbol = ir.StringAttr(op.attributes["sym_name"]).value
            if symbol != "main":
                mesh = symbol.partition(".")[0]
                texts[symbol] = _standalone(op, symbol, mesh, meshes.get(mesh, ()))
        return texts


def _standalone(op: ir.Operation, symbol: str, mesh: str, axes: MeshAxes) -> str:
    """A function as a module that XLA accepts: public ``@main``, and no attribute but aliasing and shardings."""
    clone = op.clone(ip=False).operation
    clone.attributes["sym_name"] = ir.StringAttr.get("main")
    clone.attributes["sym_visibility"] = ir.StringAttr.get("public")
    del clone.attributes["mesh_shape"]
    kept = [
        ir.DictAttr.get({name: entry[name] for name in (ALIAS, SHARDING) if name in entry})
        for entry in argument_attributes(op)
    ]
    clone.attributes["arg_attrs"] = ir.ArrayAttr.get(kept)
    partitions = num_devices(axes)
    with op.location:
        module = ir.Module.create()
        if partitions > 1:
            with ir.InsertionPoint(module.body):
                sdy.MeshOp(mesh, mesh_attribute(axes))
    module.body.append(clone)
    root = module.operation
    root.attributes["sym_name"] = ir.StringAttr.get(symbol.replace(".", "_"))
    i32 = ir.IntegerType.get_signless(32)
    root.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(i32, partitions)
    root.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(i32, 1)
    return str(root.get_asm(enable_debug_info=True))


def compile_function(text: str, devices: Sequence[JaxDevice]) -> Any:
    """Compile one stage function; returns the loaded executable.

    Args:
        text: a module; for several devices with the program of one, as ``partition`` writes it.
        devices: in the order of the mesh.
    """
    with jax_mlir.make_ir_context():
        return _compile(ir.Module.parse(text), devices)


def _compile(module: ir.Module, devices: Sequence[JaxDevice]) -> Any:
    client = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([[device.id for device in devices]]),
        backend=client,
    )
    if len(devices) > 1:  # the partitioner has a manual computation over all axes to take out, and nothing to partition
        options.executable_build_options.use_spmd_partitioning = True
        options.executable_build_options.use_shardy_partitioner = True
    if client.platform == "cpu":
        debug = options.executable_build_options.debug_options
        debug.xla_disable_hlo_passes = ",".join(filter(None, (debug.xla_disable_hlo_passes, _DROPS_BARRIERS)))
    prepare_for_xla(module)
    return compiler.compile_or_get_cached(
        client, module, np.array(devices), options, [], xla_client.DeviceList(tuple(devices))
    )


def compile_functions(
    texts: Mapping[str, str], devices: Mapping[str, Sequence[JaxDevice]]
) -> dict[str, CompiledFunction]:
    """Compile stage functions, each for its stage's mesh.

    Args:
        texts: module text by symbol. What differs in names and locations alone is compiled once for equal devices.
        devices: the devices of each symbol's mesh, in its order.
    """
    made: dict[tuple[str, tuple[JaxDevice, ...]], CompiledFunction] = {}
    functions: dict[str, CompiledFunction] = {}
    with jax_mlir.make_ir_context():
        for symbol, text in texts.items():
            module = ir.Module.parse(text)
            key = (_program_text(module), tuple(devices[symbol]))
            if key not in made:
                made[key] = _callable(module, devices[symbol])
            functions[symbol] = made[key]
    return functions


def _program_text(module: ir.Module) -> str:
    """What a module computes: its text without its name and without locations."""
    return "\n".join(str(op) for op in module.body.operations)


def structure_text(text: str) -> str:
    """What a function's module computes, whatever its stage is called."""
    with jax_mlir.make_ir_context():
        return _STAGE_MESH.sub("@mesh", _program_text(ir.Module.parse(text)))


def compile_measured(text: str, devices: Sequence[JaxDevice]) -> tuple[CompiledFunction, FunctionMemory]:
    """Compile one stage function; what calls it, and the memory of a device that XLA has planned for it."""
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        handlers = _result_handlers(module, devices)  # first: what XLA is given says less
        executable = _compile(module, devices)
    found = executable.get_compiled_memory_stats()
    memory = FunctionMemory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )
    return _caller(executable, handlers), memory


def signature_avals(text: str) -> tuple[list[ShapedArray], dict[int, int]]:
    """Shapes and dtypes of the arguments of ``@main``, and of those whose buffer a result gets, the result's number."""
    with jax_mlir.make_ir_context():
        main = main_function(ir.Module.parse(text))
        inputs = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value).inputs
        aliases = {
            number: ir.IntegerAttr(entry[ALIAS]).value
            for number, entry in enumerate(argument_attributes(main))
            if ALIAS in entry
        }
        return _avals(inputs), aliases


def device_array(view: Any, place: Sharding, copy: bool) -> jax.Array:
    """As `bactrian.runtime.transports.interface.device_array`; for one device at a tenth of the time of `jax.device_put`, which
    counts between two stage functions: with cold caches it takes 0.3 ms there."""
    key = view.shape, view.dtype, place, jax.config.read("jax_enable_x64")
    known = _placements.get(key)
    if known is None:
        if not isinstance(place, SingleDeviceSharding) or jax.dtypes.canonicalize_dtype(view.dtype) != view.dtype:
            return plain_device_array(view, place, copy)
        known = ShapedArray(view.shape, view.dtype), list(place.device_set)
        _placements[key] = known
    aval, devices = known
    return xla_client.batched_device_put(aval, place, [view], devices, True, force_copy=copy)


_placements: dict[tuple[tuple[int, ...], Any, Sharding, bool], tuple[ShapedArray, list[JaxDevice]]] = {}


def mesh_sharding(devices: Sequence[JaxDevice], axes: MeshAxes, spec: Spec) -> Sharding:
    """Where a value of a stage is.

    Args:
        devices: of the stage's mesh, in its order.
        axes: names and sizes of the mesh's axes.
        spec: of the value; dims at the end may be left out.
    """
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices).reshape([size for _, size in axes]), [name for name, _ in axes])
    return NamedSharding(mesh, PartitionSpec(*(tuple(names) or None for names in spec.dims)))


def signature_shardings(text: str, devices: Sequence[JaxDevice]) -> tuple[list[Sharding], list[Sharding]]:
    """The shardings of the arguments and of the results of ``@main``; on one device that device."""
    with jax_mlir.make_ir_context():
        return _signature_shardings(ir.Module.parse(text), devices)


def _signature_shardings(module: ir.Module, devices: Sequence[JaxDevice]) -> tuple[list[Sharding], list[Sharding]]:
    main = main_function(module)
    type_ = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
    counts = {"arg_attrs": len(type_.inputs), "res_attrs": len(type_.results)}
    if len(devices) == 1:
        single = SingleDeviceSharding(devices[0])
        return [single] * counts["arg_attrs"], [single] * counts["res_attrs"]
    axes = next(iter(mesh_axes(module).values()))

    def of(name: str) -> list[Sharding]:
        entries = [ir.DictAttr(entry) for entry in ir.ArrayAttr(main.attributes[name])]
        return [mesh_sharding(devices, axes, spec_of(entry[SHARDING])) for entry in entries]

    return (of("arg_attrs") if counts["arg_attrs"] else []), (of("res_attrs") if counts["res_attrs"] else [])


def _callable(module: ir.Module, devices: Sequence[JaxDevice]) -> CompiledFunction:
    """Call a compiled module with JAX arrays; results come back before they are computed."""
    handlers = _result_handlers(module, devices)  # first: what XLA is given says less
    return _caller(_compile(module, devices), handlers)


def _caller(executable: Any, handlers: list[Any]) -> CompiledFunction:
    execute = executable.execute_sharded

    def call(arguments: Sequence[jax.Array]) -> list[jax.Array]:
        return execute(arguments).consume_with_handlers(handlers)

    return call


def _result_handlers(module: ir.Module, devices: Sequence[JaxDevice]) -> list[Any]:
    """What makes JAX arrays of an executable's results, without a sharding object made for each."""
    shardings = _signature_shardings(module, devices)[1]
    signature = ir.FunctionType(ir.TypeAttr(main_function(module).attributes["function_type"]).value)
    return [
        pxla.global_aval_to_result_handler(aval, sharding, True)  # pyright: ignore
        for aval, sharding in zip(_avals(signature.results), shardings, strict=True)
    ]


def _avals(types: Sequence[ir.Type]) -> list[ShapedArray]:
    tensors = [ir.RankedTensorType(type_) for type_ in types]
    return [ShapedArray(tuple(t.shape), jnp.dtype(numpy_dtype(t.element_type))) for t in tensors]
