"""Compiling stage functions with XLA: the one file that touches JAX's private compile path.

Seen to work unchanged on jax 0.10.2 and 0.11.2. Compiled functions go to JAX's compilation cache when it is set.
"""

from __future__ import annotations

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
from jax.sharding import Sharding, SingleDeviceSharding
from jaxlib.mlir import ir

from bactrian.driver.extract import numpy_dtype
from bactrian.runtime.transport import device_array as plain_device_array

Device = Any  # jax.Device, which its own stubs declare as a variable
StageFunction = Callable[[Sequence[jax.Array]], list[jax.Array]]


def function_texts(staged: ir.Module) -> dict[str, str]:
    """Each stage function as a module of its own (text with ``@main``), by its symbol."""
    with staged.context:
        texts: dict[str, str] = {}
        for view in staged.body.operations:
            op = view.operation
            if op.name != "func.func":
                continue
            symbol = ir.StringAttr(op.attributes["sym_name"]).value
            if symbol != "main":
                texts[symbol] = _standalone(op, symbol)
        return texts


def _standalone(op: ir.Operation, symbol: str) -> str:
    """A function as a module that XLA accepts: public ``@main``, and no attribute but aliasing."""
    clone = op.clone(ip=False).operation
    clone.attributes["sym_name"] = ir.StringAttr.get("main")
    clone.attributes["sym_visibility"] = ir.StringAttr.get("public")
    del clone.attributes["mesh_shape"]
    kept = [
        ir.DictAttr.get({name: entry[name] for name in ("tf.aliasing_output",) if name in entry})
        for entry in (ir.DictAttr(attribute) for attribute in ir.ArrayAttr(op.attributes["arg_attrs"]))
    ]
    clone.attributes["arg_attrs"] = ir.ArrayAttr.get(kept)
    with op.location:
        module = ir.Module.create()
    module.body.append(clone)
    root = module.operation
    root.attributes["sym_name"] = ir.StringAttr.get(symbol.replace(".", "_"))
    i32 = ir.IntegerType.get_signless(32)
    root.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(i32, 1)
    root.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(i32, 1)
    return str(root.get_asm(enable_debug_info=True))


def compile_function(text: str, device: Device) -> Any:
    """Compile one stage function for one device; returns the loaded executable."""
    client = device.client
    devices = np.array([device])
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=client
    )
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        return compiler.compile_or_get_cached(
            client, module, devices, options, [], xla_client.DeviceList(tuple(devices.flat))
        )


def compile_functions(texts: Mapping[str, str], devices: Mapping[str, Device]) -> dict[str, StageFunction]:
    """Compile stage functions, each for its stage's device.

    Args:
        texts: module text by symbol; equal texts for one device are compiled once.
        devices: the device of each symbol.
    """
    made: dict[tuple[str, Device], StageFunction] = {}
    functions: dict[str, StageFunction] = {}
    for symbol, text in texts.items():
        device = devices[symbol]
        key = (text, device)
        if key not in made:
            made[key] = _callable(compile_function(text, device), text, device)
        functions[symbol] = made[key]
    return functions


def device_array(view: Any, place: Sharding, copy: bool) -> jax.Array:
    """As `bactrian.runtime.transport.device_array`; for one device at a tenth of the time of `jax.device_put`, which
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


_placements: dict[tuple[tuple[int, ...], Any, Sharding, bool], tuple[ShapedArray, list[Device]]] = {}


def _callable(executable: Any, text: str, device: Device) -> StageFunction:
    """Call an executable on one device with JAX arrays; results come back before they are computed."""
    execute, handlers = executable.execute_sharded, _result_handlers(text, device)

    def call(arguments: Sequence[jax.Array]) -> list[jax.Array]:
        return execute(arguments).consume_with_handlers(handlers)

    return call


def _result_handlers(text: str, device: Device) -> list[Any]:
    """What makes JAX arrays of an executable's results, without a sharding object made for each."""
    sharding = SingleDeviceSharding(device)
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        signature = ir.FunctionType(ir.TypeAttr(module.body.operations[0].attributes["function_type"]).value)
        types = [ir.RankedTensorType(type_) for type_ in signature.results]
        avals = [ShapedArray(tuple(t.shape), jnp.dtype(numpy_dtype(t.element_type))) for t in types]
    return [pxla.global_aval_to_result_handler(aval, sharding, True) for aval in avals]  # pyright: ignore
