"""The plan as plain data: what was decided about a program, and what is predicted of it. No MLIR, no jax."""
