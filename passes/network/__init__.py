"""Pairwise cost networks with memory: the problem under `solve-shardings`, its reductions and its solvers. No MLIR."""
