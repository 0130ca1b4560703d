"""Stages of a plan, measured on this host's devices: each different function once, from a cache or in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

from bactrian.driver.planning.simulated_step import measured_timing
from bactrian.driver.planning.stage_memory import fewer_microbatches, stage_peak
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.profile.function_profile import FunctionFailure, FunctionProfile, Measured
from bactrian.driver.profile.profile_cache import Environment, ProfileCache
from bactrian.driver.profile.time_function import TimedFunction, time_function
from bactrian.driver.progress import progress
from bactrian.driver.xla.compile_stage import function_texts, structure_text
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.processes import GuardedProcess, ProcessLost
from bactrian.passes.frame.units import human_bytes
from bactrian.passes.machine.cluster_file import read_cluster
from bactrian.passes.machine.host_cores import num_cores
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.plan.schema import fingerprint_text
from bactrian.passes.plan.step_timing import StageMeasurement, StageTiming
from bactrian.runtime.unrolled_step import UnrolledStep

SECONDS = 0.3  # for one function, once it is compiled
_COUNT = "--xla_force_host_platform_device_count"
TIME_LIMIT = 300.0  # seconds for one function, with the start of a process and compiling


@dataclass(frozen=True)
class StageProfile:
    """What was measured of a stage.

    Attributes:
        timing: its seconds.
        measurement: what a plan keeps beside them.
    """

    timing: StageTiming
    measurement: StageMeasurement


@dataclass(frozen=True)
class StageFailure:
    """A stage that can't run, and why."""

    reason: str


class StageProfiler:
    """Measures stages for a cluster whose hosts are like this one.

    A stage gets as many of this host's devices, and as large a share of its cores, as it has of a host of the cluster.

    Args:
        cluster: the file of the machines.
        folder: where measurements are kept.
        time_limit: seconds for one function.

    Raises:
        ConfigError: the cluster's hosts are of several kinds, or have more devices than this one; the folder can't be used.
    """

    def __init__(self, cluster: str, folder: Path, time_limit: float = TIME_LIMIT) -> None:
        self._hosts, self._time_limit = _hosts_like_this(cluster), time_limit
        self._known = dict[str, Measured]()
        self.cache = ProfileCache(folder, _environment(self._hosts.devices_per_host))

    def profile(self, staged: StagedPlan) -> tuple[StageProfile | StageFailure | None, ...]:
        """What is measured of each stage; None for those whose mesh is larger than a host."""
        program, texts = staged.program, function_texts(staged.module)
        step = UnrolledStep(fewer_microbatches(program))
        by_size = dict[int, list[int]]()
        for stage in range(program.num_stages):
            by_size.setdefault(program.num_devices(stage), []).append(stage)
        found = dict[int, StageProfile | StageFailure]()
        with progress("measuring stages", total=program.num_stages) as advance:
            for size, stages in sorted(by_size.items()):
                if size <= self._hosts.devices_per_host:
                    with GuardedProcess(_variables(size)) as process:
                        for stage in stages:
                            found[stage] = self._stage(staged, step, stage, texts, process)
                            advance()
        return tuple(found.get(stage) for stage in range(program.num_stages))

    def _stage(
        self, staged: StagedPlan, step: UnrolledStep, stage: int, texts: Mapping[str, str], process: GuardedProcess
    ) -> StageProfile | StageFailure:
        """One stage; after the first function that can't run, no other is asked for."""
        profiles = dict[str, FunctionProfile]()
        for symbol in dict.fromkeys(call.function for call in staged.program.calls if call.stage == stage):
            match self._function(texts[symbol], staged.program.num_devices(stage), process):
                case FunctionFailure(reason):
                    return StageFailure(f"{symbol.partition('.')[2]}: {reason}")
                case measured:
                    profiles[symbol] = measured
        peak = stage_peak(step, stage, {symbol: profile.memory for symbol, profile in profiles.items()}).nbytes
        if peak > self._hosts.memory_bytes:
            needs, has = human_bytes(peak), human_bytes(round(self._hosts.memory_bytes))
            return StageFailure(f"compiled, it needs {needs} of each device, which has {has}")
        timing = measured_timing(
            staged.plan, staged.program, stage, {symbol: profile.seconds for symbol, profile in profiles.items()}
        )
        return StageProfile(timing, StageMeasurement(peak, staged.plan.stages[stage].predicted_seconds or 0.0))

    def _function(self, text: str, num_devices: int, process: GuardedProcess) -> Measured:
        """One function, which is timed if nothing is known of it."""
        key = fingerprint_text(f"{num_devices} devices\n{structure_text(text)}")
        known = self._known.get(key) or self.cache.get(key)
        if known is None:
            cores = max(1, num_cores() * num_devices // self._hosts.devices_per_host) if _is_on_cores() else 0
            task = TimedFunction(text, num_devices, cores, SECONDS)
            try:
                known = process.run(time_function, task, self._time_limit)
            except ProcessLost as lost:
                known = FunctionFailure(str(lost), may_pass=lost.is_late)
            if not isinstance(known, FunctionFailure) or not known.may_pass:
                self.cache.put(key, known)
        self._known[key] = known
        return known


def default_folder() -> Path:
    """Where measurements are kept, if no folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bactrian" / "profiles"


def _hosts_like_this(cluster: str) -> HostGroup:
    hosts, *others = read_cluster(cluster).groups
    if others:
        raise ConfigError(
            f"cannot profile for {cluster}: it has hosts of {len(others) + 1} kinds, and this host is of one",
            fix="leave the profile out, or describe one kind",
        )
    count, what = (num_cores(), "cores") if _is_on_cores() else (len(jax.local_devices()), "devices")
    if hosts.devices_per_host > count:
        raise ConfigError(
            f"cannot profile for {cluster}: its hosts have {hosts.devices_per_host} devices, this one has {count} {what}",
            why="what is measured here would say nothing of them",
            fix="plan on a host of the cluster, or leave the profile out",
        )
    return hosts


def _is_on_cores() -> bool:
    return jax.local_devices()[0].platform == "cpu"


def _environment(devices_per_host: int) -> Environment:
    device = jax.local_devices()[0]
    kind = f"{_processor()}, {num_cores()} cores" if _is_on_cores() else device.device_kind
    software = [f"{name} {version(name)}" for name in ("jax", "jaxlib")]
    return Environment(f"{devices_per_host} devices of a host ({kind})", " ".join([*software, _flags()]).strip())


def _flags() -> str:
    """The user's flags of XLA, without the number of virtual devices."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_COUNT))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _variables(num_devices: int) -> dict[str, str]:
    """What a process needs for so many devices: virtual ones where they are cores, else no more memory than it uses."""
    platform = jax.local_devices()[0].platform
    found = {"JAX_PLATFORMS": "cuda" if platform == "gpu" else platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if _is_on_cores():
        found["XLA_FLAGS"] = f"{_flags()} {_COUNT}={num_devices}".strip()
    return found
