"""Bactrian: any JAX train step on any cluster, as a plan that can be read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bactrian.driver.api import parallelize
    from bactrian.driver.arrays.distributed_array import DistributedArray
    from bactrian.driver.arrays.host_values import gather, put
    from bactrian.driver.capture.gradient_boundary import grad, microbatch_index, stage_boundary, value_and_grad
    from bactrian.driver.progress import is_main_rank, progress
    from bactrian.passes.frame.errors import (
        BactrianError,
        ConfigError,
        InfeasiblePlanError,
        PassError,
        ProgramError,
        RuntimeFault,
    )
    from bactrian.passes.plan.schema import Plan

__version__ = "0.1.0"

__all__ = [
    "BactrianError",
    "ConfigError",
    "DistributedArray",
    "InfeasiblePlanError",
    "PassError",
    "Plan",
    "ProgramError",
    "RuntimeFault",
    "gather",
    "grad",
    "is_main_rank",
    "microbatch_index",
    "parallelize",
    "progress",
    "put",
    "stage_boundary",
    "value_and_grad",
]

# Public name -> the module that defines it. Nothing is imported before it is asked for.
_PUBLIC: dict[str, str] = {
    "parallelize": "bactrian.driver.api",
    "value_and_grad": "bactrian.driver.capture.gradient_boundary",
    "grad": "bactrian.driver.capture.gradient_boundary",
    "microbatch_index": "bactrian.driver.capture.gradient_boundary",
    "stage_boundary": "bactrian.driver.capture.gradient_boundary",
    "gather": "bactrian.driver.arrays.host_values",
    "put": "bactrian.driver.arrays.host_values",
    "DistributedArray": "bactrian.driver.arrays.distributed_array",
    "is_main_rank": "bactrian.driver.progress",
    "progress": "bactrian.driver.progress",
    "Plan": "bactrian.driver.report.plan_table",  # where its table is, so that users can print plans
    "BactrianError": "bactrian.passes.frame.errors",
    "ConfigError": "bactrian.passes.frame.errors",
    "InfeasiblePlanError": "bactrian.passes.frame.errors",
    "PassError": "bactrian.passes.frame.errors",
    "ProgramError": "bactrian.passes.frame.errors",
    "RuntimeFault": "bactrian.passes.frame.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bactrian' has no attribute {name!r}")
    try:
        module = importlib.import_module(_PUBLIC[name])
    except ModuleNotFoundError as error:
        if error.name not in ("bactrian.driver", "bactrian.passes"):
            raise
        raise ImportError(
            f"bactrian.{name} is not there: this is a checkout of Bactrian that is not installed; "
            "run `pip install --editable .` in it"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_PUBLIC])
