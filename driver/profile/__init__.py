"""Measuring this host's devices, and the cluster file that it gives."""
