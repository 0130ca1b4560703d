"""The compiler: StableHLO passes, the cost model and the plan. Imports no jax, MPI or GPU library."""
