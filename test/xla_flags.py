"""Flags of XLA for tests, which spend their time compiling tiny modules that run a few times.

Both sides of every comparison are compiled alike; processes that tests start inherit the flags or get them.
"""

from __future__ import annotations

import importlib.metadata

DEVICES = "--xla_force_host_platform_device_count=8"  # virtual devices for the stages
QUICK = ["--xla_backend_optimization_level=0"]  # LLVM's optimizer off
# XLA up to jax 0.10 can also write fusions without MLIR, in half the time. What memory it needs was the same wherever that
# was compared, the code is not; tests with jax 0.11 run what is written by default. Later ones don't know the flags, and abort on what they don't know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
