"""Measures the devices of this host, all of them at once: in a train step they are busy together."""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bactrian.driver.profile.cluster_profile import Profile, Sample
from bactrian.driver.progress import Advance, progress
from bactrian.driver.xla.compile_stage import JaxDevice
from bactrian.passes.frame.errors import BactrianError, ConfigError
from bactrian.passes.machine.collective_times import KINDS
from bactrian.passes.machine.host_cores import num_cores
from bactrian.runtime.rank_lifecycle import keep_memory

_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
_ALL = PartitionSpec(("outer", "inner"))
_LEAST_RUNS, _MOST_RUNS = 3, 100
_REPACK_PAIRS = 15
_CALL_RUNS, _CALL_VALUES = 200, 16
_REPACK_NOISE = 0.05  # of the time of a product: what is less is not told from nothing


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device.

    Attributes:
        widths: of square matrices, the smallest first.
        chain: matrix products in one call.
        elementwise_bytes: of the operand of an elementwise op.
        whole_bytes: of collectives: of the largest tensor that one device holds before or after it.
        chained_bytes: collectives of one call have so many together, but they are one at least and eight at most.
    """

    widths: tuple[int, ...]
    chain: int
    elementwise_bytes: int
    whole_bytes: tuple[int, ...]
    chained_bytes: int


_CPU = Sizes((256, 512, 1024), 1, 24 << 20, tuple(4**power << 13 for power in range(6)), 1 << 20)
_GPU = Sizes((2048, 4096, 8192), 4, 512 << 20, tuple(4**power << 17 for power in range(6)), 16 << 20)


def profile_host(num_devices: int | None, seconds: float) -> Profile:
    """Measure the first devices that jax has in this process.

    Args:
        num_devices: how many; all by default.
        seconds: to measure for, without what compiling and each figure's first four runs take beyond it.

    Raises:
        ConfigError: there are fewer devices, or only one, or neither CPUs nor GPUs.
    """
    devices = _devices(num_devices)
    sizes = _CPU if devices[0].platform == "cpu" else _GPU
    groups = [size for size in range(2, len(devices) + 1) if len(devices) % size == 0]
    num_samples = len(KINDS) * len(groups) * len(sizes.whole_bytes)
    memory_bytes, memory_source = _memory(devices)
    keep_memory()
    with progress("measuring", total=num_samples + len(_DTYPES) + 3) as advance:
        share = seconds / 2 / (len(_DTYPES) * len(sizes.widths) + 2)
        flops = {name: _matmul_rate(devices, dtype, sizes, share, advance) for name, dtype in _DTYPES.items()}
        rate = _elementwise_rate(devices, sizes.elementwise_bytes, share)
        advance()
        repack = _repack_rate(devices, sizes, share)
        advance()
        call = _call_seconds(devices[0])
        advance()
        samples = tuple(_samples(devices, groups, sizes, seconds / 2 / num_samples, advance))
    return Profile(_describe(devices), len(devices), memory_bytes, memory_source, flops, rate, samples, repack, call)


def _devices(num_devices: int | None) -> list[JaxDevice]:
    devices = jax.local_devices()
    if devices[0].platform not in ("cpu", "gpu"):
        raise ConfigError(
            f"cannot profile {devices[0].platform} devices", why="only CPUs and GPUs have been thought of"
        )
    if num_devices is not None and num_devices > len(devices):
        cause = f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}" if devices[0].platform == "cpu" else ""
        raise ConfigError(
            f"cannot profile {num_devices} devices: jax has {len(devices)} ({devices[0].device_kind})",
            why=cause,
            fix="ask for fewer with --devices",
        )
    devices = devices[:num_devices]
    if len(devices) == 1:
        raise ConfigError(
            f"cannot profile one device ({devices[0].device_kind}): a cluster file says what its links can do",
            why="a collective needs two devices",
            fix="give --devices 2 or more" if devices[0].platform == "cpu" else "write the file by hand",
        )
    return devices


def _describe(devices: Sequence[JaxDevice]) -> str:
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}"
    return f"{len(devices)} virtual CPU devices on {num_cores()} cores"


def _memory(devices: Sequence[JaxDevice]) -> tuple[int, str]:
    """Bytes of one device, and where that comes from."""
    if devices[0].platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            total = min(total, int(text))
        return total // len(devices), f"the host's memory, divided by {len(devices)} devices"
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    if not min(limits):
        raise ConfigError(f"{devices[limits.index(0)]} does not say how much memory it has", fix="write it by hand")
    return min(limits), "what jax may take of a device"


def _mesh(devices: Sequence[JaxDevice], group: int) -> Mesh:
    return Mesh(np.array(devices).reshape(-1, group), ("outer", "inner"))


def _operands(mesh: Mesh, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    """Arrays of each of these shapes on each device, so small that products of square matrices do not grow."""

    def waves(shape: tuple[int, ...]) -> jax.Array:
        wide = (mesh.size * shape[0], *shape[1:])
        return (jnp.sin(jnp.arange(math.prod(wide), dtype=jnp.float32)) / shape[-1] ** 0.5).reshape(wide).astype(dtype)

    return jax.jit(lambda: [waves(shape) for shape in shapes], out_shardings=NamedSharding(mesh, _ALL))()


def _compiled(function: Callable[..., jax.Array], mesh: Mesh, operands: Sequence[jax.Array]) -> jax.stages.Compiled:
    """A function of what each device holds of the operands."""
    specs = (_ALL,) * len(operands)
    wide = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_ALL, check_vma=False))
    return wide.lower(*operands).compile()


def _median_seconds(call: Callable[[], jax.Array], share: float) -> float:
    """Of one call that is waited for, after one that is not counted."""
    call().block_until_ready()
    runs = list[float]()
    while len(runs) < _LEAST_RUNS or (sum(runs) < share and len(runs) < _MOST_RUNS):
        start = time.perf_counter()
        call().block_until_ready()
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def _matmul_rate(devices: Sequence[JaxDevice], dtype: str, sizes: Sizes, share: float, advance: Advance) -> float:
    """The best flops per second of a device over the sizes; a size that would take too long is left out."""
    mesh, best, seconds = _mesh(devices, 1), 0.0, 0.0

    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        for number, width in enumerate(sizes.widths):
            if number and 8 * seconds > share:  # twice as wide is eight times the work
                break
            operands = _operands(mesh, (width, width), (width, width), dtype=dtype)
            compiled = _compiled(partial(_products, sizes.chain, 1), mesh, operands)
            seconds = _median_seconds(partial(compiled, *operands), share)
            best = max(best, sizes.chain * 2 * width**3 / seconds)
    advance()
    return best


def _repack_rate(devices: Sequence[JaxDevice], sizes: Sizes, share: float) -> float | None:
    """Bytes of both operands per second that a product over rows takes longer than one over columns; None if it does not.

    Of the smaller widths, where the difference is more than the noise of the product; both in turn.
    """
    mesh, more, nbytes = _mesh(devices, 1), 0.0, 0
    for width in sizes.widths[:2]:
        operands = _operands(mesh, (width, width), (width, width))
        columns, rows = (_compiled(partial(_products, sizes.chain, dim), mesh, operands) for dim in (1, 0))
        pairs = [
            (_median_seconds(partial(rows, *operands), 0.0), _median_seconds(partial(columns, *operands), 0.0))
            for _ in range(_REPACK_PAIRS)
        ]
        taken = statistics.median(first - second for first, second in pairs)
        if taken < _REPACK_NOISE * statistics.median(second for _, second in pairs):
            return None
        more += taken
        nbytes += sizes.chain * 2 * 4 * width**2
    return nbytes / more


def _call_seconds(device: JaxDevice) -> float:
    """Of a call that adds one to each of a few numbers, until its results are there: what any call takes beside its work."""
    numbers = [jax.device_put(np.float32(number), device) for number in range(_CALL_VALUES)]
    compiled = jax.jit(lambda values: [value + 1 for value in values]).lower(numbers).compile()
    runs = list[float]()
    for _ in range(_CALL_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(numbers))
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def _products(chain: int, dim: int, x: jax.Array, weights: jax.Array) -> jax.Array:
    for _ in range(chain):
        x = lax.dot_general(x, weights, (((dim,), (0,)), ((), ())))
    return x


def _elementwise_rate(devices: Sequence[JaxDevice], nbytes: int, share: float) -> float:
    """Bytes per second that an elementwise op reads and writes on each device."""
    mesh = _mesh(devices, 1)
    (x,) = _operands(mesh, (nbytes // 4,))
    # In place: a new result would be paid for page by page, which says nothing of the memory.
    scale = jax.jit(lambda x: 0.5 * x + 1.0, donate_argnums=0, out_shardings=x.sharding).lower(x).compile()

    def call() -> jax.Array:
        nonlocal x
        x = scale(x)
        return x

    return 2 * nbytes / _median_seconds(call, share)


def _samples(
    devices: Sequence[JaxDevice], groups: Sequence[int], sizes: Sizes, share: float, advance: Advance
) -> Iterator[Sample]:
    # A reduce-scatter by itself takes half the time of an all-reduce on CPUs, but the pieces that a step scatters are brought
    # into one tensor and out of it again, and steps take as long with reduce-scatters as with all-reduces that are cut.
    scatters = devices[0].platform != "cpu"
    for kind in KINDS:
        for group in groups:
            for whole in sizes.whole_bytes:
                chain = max(1, min(8, sizes.chained_bytes // whole))
                count = -(-whole // (4 * group))  # of elements of a piece
                count = count if kind == "all_gather" else count * group
                mesh = _mesh(devices, group)
                operands = _operands(mesh, (count,))
                compiled = _compiled(_collectives(kind, group, chain, scatters), mesh, operands)
                sliced = kind == "reduce_scatter" and not scatters
                check_number(compiled.as_text() or "", "all_reduce" if sliced else kind, chain)
                seconds = _median_seconds(partial(compiled, *operands), share) / chain
                yield Sample(kind, group, 4 * count, seconds)
                advance()


def _collectives(kind: str, group: int, chain: int, scatters: bool) -> Callable[[jax.Array], jax.Array]:
    """So many collectives, each of which needs the result of the one before."""
    ring = [(at, (at + 1) % group) for at in range(group)]

    def slice_of_sum(x: jax.Array) -> jax.Array:
        size = len(x) // group
        return lax.dynamic_slice_in_dim(lax.psum(x, "inner"), lax.axis_index("inner") * size, size)

    one: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all_gather": lambda x: lax.all_gather(x, "inner", tiled=True),
        "reduce_scatter": (lambda x: lax.psum_scatter(x, "inner", tiled=True)) if scatters else slice_of_sum,
        "all_reduce": lambda x: lax.psum(x, "inner"),
        "all_to_all": lambda x: lax.all_to_all(x, "inner", 0, 0, tiled=True),
        "collective_permute": lambda x: lax.ppermute(x, "inner", ring),
    }

    def run(x: jax.Array) -> jax.Array:
        y = one[kind](x)
        for _ in range(chain - 1):
            x = _operand(x, y)
            y = one[kind](x)
        return y

    return run


def _operand(x: jax.Array, y: jax.Array) -> jax.Array:
    """What the next collective takes, at little cost: as large as its operand x, and made of its result y."""
    if y.size > x.size:
        return y[: x.size]
    if y.size < x.size:
        return x.at[: y.size].set(y)
    return y.at[0].set(x[0])  # else a second all-reduce of one result is a product


def check_number(text: str, kind: str, number: int) -> None:
    """See that XLA left the collectives that were asked for."""
    name = kind.replace("_", "-")
    found = len(re.findall(rf"\b{name}(?:-start)?\(", text))
    if found < number:
        raise BactrianError(f"XLA made {found} of {number} collectives {name} that were to be measured")
