"""Pipeline schedules: the order in which each stage works on the microbatches. No MLIR, no jax."""
