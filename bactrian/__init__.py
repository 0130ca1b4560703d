"""Bactrian: any JAX train step on any cluster, as a plan that can be read."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing is imported before it is asked for.
_PUBLIC: dict[str, str] = {
    "parallelize": "bactrian.driver.api",
    "value_and_grad": "bactrian.driver.boundary",
    "grad": "bactrian.driver.boundary",
    "microbatch_index": "bactrian.driver.boundary",
    "stage_boundary": "bactrian.driver.boundary",
    "gather": "bactrian.driver.arrays",
    "put": "bactrian.driver.arrays",
    "DistributedArray": "bactrian.driver.arrays",
    "is_main_rank": "bactrian.driver.progress",
    "progress": "bactrian.driver.progress",
    "Plan": "bactrian.passes.plan",
    "BactrianError": "bactrian.passes.errors",
    "ProgramError": "bactrian.passes.errors",
    "ConfigError": "bactrian.passes.errors",
    "InfeasiblePlanError": "bactrian.passes.errors",
    "PassError": "bactrian.passes.errors",
    "RuntimeFault": "bactrian.passes.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bactrian' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_PUBLIC])
