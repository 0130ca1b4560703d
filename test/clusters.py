"""Cluster files for tests: one host of eight devices, by what is dear on it."""

from __future__ import annotations


def cluster_text(
    peak_tflops: str, memory_gb_per_s: float, latency_us: float, *, memory_gib: float = 1, tables: str = ""
) -> str:
    """The TOML of one host of eight devices with links of 1 GB/s; ``tables`` are measured times of collectives."""
    return f"""
hosts = 1
devices_per_host = 8
memory_gib = {memory_gib}
peak_tflops = {{ {peak_tflops} }}
memory_gb_per_s = {memory_gb_per_s}
intra_host_gb_per_s = 1.0
intra_host_latency_us = {latency_us}
{tables}"""


# Slow devices on fast links: whatever can be cut is.
SLOW = cluster_text("f32 = 1e-5, bf16 = 2e-5", 0.001, 0.01)
# Devices that are fast enough for shardings to be weighed against each other.
FAST = cluster_text("f32 = 1e-3", 0.1, 1)
